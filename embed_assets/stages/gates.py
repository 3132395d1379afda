"""Gates: what a space must pass before readers get it. Each says its figure, its limit, and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from embed_assets.errors import UserError
from embed_assets.lake.generations import GateResult
from embed_assets.lake.snapshot import Snapshot
from embed_assets.quality.probe import LEAST_QUERIES, loss, recall
from embed_assets.quality.vectors import VectorQuality, measure
from embed_assets.settings import Settings
from embed_assets.stages.canaries import LIMIT, canary_cosine, least_cosine
from embed_assets.stages.evaluation import evaluate, load_labels
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.probing import queries_of, reciprocal_ranks
from embed_assets.stages.reproduction import Reproduction, reproduce
from embed_assets.stages.space_scan import SpaceScan, scan_space

_TOO_FEW = "the space has too few vectors to tell"


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the documents that the lake holds a space covers."""

    documents: int
    """Documents of the lake."""
    covered: int
    """Those in partitions that are up to date in the space."""
    missing: Sequence[str]
    """Keys of the other partitions, sorted."""

    @property
    def share(self) -> float:
        """From 0 to 1; 1 if there are no documents."""
        return self.covered / self.documents if self.documents else 1.0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


@dataclass(frozen=True)
class Trial:
    """A space on trial, and what its gates have looked at so far."""

    pipeline: Pipeline
    """That of the space."""
    baseline: Pipeline | None
    """That of the active space; None if there is no other."""
    tables: Snapshot
    coverage: Coverage

    @property
    def space(self) -> str:
        """Name of the space."""
        return self.pipeline.model.space.name

    @property
    def settings(self) -> Settings:
        """The limits."""
        return self.pipeline.settings

    @cached_property
    def reproduction(self) -> Reproduction | None:
        """Some of its chunks, embedded again. Raises ``ModelError`` or ``LakeError``."""
        return reproduce(self.pipeline, self.tables, self.scan)

    @cached_property
    def quality(self) -> VectorQuality | None:
        """What a sample of the vectors says; None if it is too small. Raises ``LakeError`` as `scan`."""
        return measure(self.scan.sample, self.scan.input_hashes)

    @cached_property
    def scan(self) -> SpaceScan:
        """All vectors of the space. Raises ``LakeError`` if one can't be read."""
        return scan_space(self.tables, self.pipeline.embeddings_table)


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate of a space."""

    name: str
    description: str
    ask: Callable[[Trial], GateResult]
    """Evaluates the gate. May raise ``UserError``."""


def judge(trial: Trial, on_gate: Callable[[str], None] = lambda name: None, but: str = "") -> list[GateResult]:
    """What each gate says, but for the one of this name. One that can't be evaluated fails, with the reason."""
    found = []
    for gate in (gate for gate in GATES if gate.name != but):
        on_gate(gate.name)
        try:
            found.append(gate.ask(trial))
        except UserError as error:
            found.append(GateResult(gate.name, False, None, None, f"it could not be evaluated: {error}"))
    return found


def _coverage(trial: Trial) -> GateResult:
    covered = trial.coverage
    detail = f"{covered.covered:,} of {covered.documents:,} documents are in the space"
    if covered.missing:
        shown = ", ".join(map(repr, covered.missing[:5])) + (", ..." if len(covered.missing) > 5 else "")
        detail += f"; {len(covered.missing):,} partitions are not up to date in it ({shown}): run 'embed-assets sync'"
    return GateResult("coverage", covered.is_complete, round(100 * covered.share, 2), 100.0, detail)


def _vectors(trial: Trial) -> GateResult:
    scan = trial.scan
    counts = {
        "of another dimension": scan.wrong_dimension,
        "with values that are not finite": scan.not_finite,
        "not of unit norm": scan.not_unit_norm,
    }
    wrong = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    good = f"all {scan.rows:,} vectors are finite, of unit norm and of {scan.dimension} dimensions"
    return GateResult(
        "vectors", not wrong, scan.broken, 0, f"{wrong}; run 'embed-assets verify --repair' and sync" if wrong else good
    )


def _truncated(trial: Trial) -> GateResult:
    scan, limit = trial.scan, trial.settings.max_truncated_percent
    percent = round(100 * scan.truncated / scan.rows, 2) if scan.rows else 0.0
    detail = f"{scan.truncated:,} of {scan.rows:,} chunks were cut to fit the model"
    advice = "" if percent <= limit else "; lower EMBED_CHUNK_TOKENS, or raise EMBED_MAX_TRUNCATED_PERCENT"
    return GateResult("truncated_share", percent <= limit, percent, limit, detail + advice)


def _collapse(trial: Trial) -> GateResult:
    """Whether all texts get nearly the same vector."""
    found, limit = trial.quality, trial.settings.max_mean_cosine
    if found is None:
        return GateResult("collapse", True, None, limit, _TOO_FEW)
    detail = f"two texts of {found.rows:,} have a mean cosine of {found.mean_cosine:.3f}"
    good = found.mean_cosine <= limit
    advice = "" if good else "; all texts get nearly the same vector: look at the model's pooling and its weights"
    return GateResult("collapse", good, round(found.mean_cosine, 4), limit, detail + advice)


def _effective_rank(trial: Trial) -> GateResult:
    """In how many directions the vectors vary, against what they could."""
    found, limit = trial.quality, trial.settings.min_effective_rank_percent
    if found is None:
        return GateResult("effective_rank", True, None, limit, _TOO_FEW)
    detail = f"{found.rows:,} vectors vary in {found.effective_rank:.0f} of {found.dimension} directions"
    good = found.effective_rank_percent >= limit
    advice = "" if good else "; texts differ in few ways: look at the model's weights and its tokenizer"
    return GateResult("effective_rank", good, round(found.effective_rank_percent, 2), limit, detail + advice)


def _dead_dimensions(trial: Trial) -> GateResult:
    """Dimensions that are the same for all texts."""
    found, limit = trial.quality, trial.settings.max_dead_dimensions_percent
    if found is None:
        return GateResult("dead_dimensions", True, None, limit, _TOO_FEW)
    dead = found.dead_dimensions
    percent = round(100 * len(dead) / found.dimension, 2)
    detail = f"{len(dead)} of {found.dimension} dimensions do not vary{_first(dead)}"
    again = trial.reproduction if dead else None
    if again is not None and (lost := again.filled_again(dead)):
        lost_detail = f"{detail}; the model fills {len(lost)} of them{_first(lost)}: embed the partitions again"
        return GateResult("dead_dimensions", False, percent, limit, lost_detail)
    advice = "" if percent <= limit else "; look at the model's last layer, or raise EMBED_MAX_DEAD_DIMENSIONS_PERCENT"
    return GateResult("dead_dimensions", percent <= limit, percent, limit, detail + advice)


def _first(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f" ({shown})" if numbers else ""


def _reproduction(trial: Trial) -> GateResult:
    """Chunks that are embedded again must get the vectors that are stored."""
    again = trial.reproduction
    if again is None:
        return GateResult("reproduction", True, None, LIMIT, "the space has no chunks to embed again")
    limit = least_cosine(trial.pipeline.model.engine.info.precision)
    worst = int(again.cosines.argmin())
    cosine = float(again.cosines[worst])
    detail = f"{len(again.chunk_ids)} chunks, embedded again, have a cosine of at least {cosine:.6f} to what is stored"
    advice = (
        "" if cosine > limit else f"; look at the chunk {again.chunk_ids[worst]}: another model, or another text's row"
    )
    return GateResult("reproduction", cosine > limit, round(cosine, 6), limit, detail + advice)


def _near_duplicates(trial: Trial) -> GateResult:
    """Different texts that the space hardly tells apart."""
    found, limit = trial.quality, trial.settings.max_near_duplicate_percent
    if found is None:
        return GateResult("near_duplicates", True, None, limit, _TOO_FEW)
    percent = round(found.near_duplicate_percent, 2)
    detail = f"{percent:g} % of {found.rows:,} vectors are those of another text but for a cosine of 0.001"
    advice = "" if percent <= limit else "; look at what the texts have in common: templates, or unknown tokens"
    return GateResult("near_duplicates", percent <= limit, percent, limit, detail + advice)


def _retrieval_probe(trial: Trial) -> GateResult:
    """Headings and sentences of chunks must find where they are from as well as in the active space."""
    limit = trial.settings.max_probe_loss_percent
    models = [p.settings.model for p in (trial.pipeline, trial.baseline) if p is not None]
    if any(model.startswith("fake:") for model in models):
        return GateResult(
            "retrieval_probe", True, None, limit, "a fake model's vectors find nothing, so nothing is asked"
        )
    queries = queries_of(trial.pipeline, trial.tables)
    if len(queries) < LEAST_QUERIES:
        few = f"{len(queries)} headings and sentences are too few to tell"
        return GateResult("retrieval_probe", True, None, limit, few)
    now = reciprocal_ranks(trial.pipeline, trial.tables, queries)
    if trial.baseline is None:
        alone = f"{100 * recall(now):.0f} % of {len(queries)} headings and sentences find their chunk"
        return GateResult("retrieval_probe", True, None, limit, f"{alone}; there is no space to compare with")
    before = reciprocal_ranks(trial.baseline, trial.tables, queries)
    lost = loss(before, now)
    detail = (
        f"{100 * recall(before):.0f} % of {len(queries)} headings and sentences found their chunk before, "
        f"{100 * recall(now):.0f} % do now; {lost.percent:.1f} % of the mean reciprocal rank are lost "
        f"(95 % from {lost.low:.1f} to {lost.high:.1f})"
    )
    good = lost.percent <= limit
    advice = "" if good else "; look at the model's weights, pooling and prompts"
    return GateResult("retrieval_probe", good, round(lost.percent, 2), limit, detail + advice)


def _canaries(trial: Trial) -> GateResult:
    engine = trial.pipeline.model.engine
    found = canary_cosine(trial.pipeline, engine.embedder, engine.info.precision)
    if found is None:
        return GateResult(
            "canaries", True, None, LIMIT, "the space had no canaries; their vectors are kept from now on"
        )
    cosine, limit = found
    good = "the engine gives the vectors that it gave when the space was new"
    bad = "the engine or the weights have changed since the space was new: compare versions of torch and the device"
    return GateResult("canaries", cosine > limit, round(cosine, 6), limit, good if cosine > limit else bad)


def _evaluation(trial: Trial) -> GateResult:
    """The labelled set's verdict: nDCG@10 must not fall."""
    limit = -trial.settings.max_evaluation_loss
    labelled = load_labels(trial.settings, trial.tables)
    if labelled is None:
        return GateResult("evaluation", True, None, limit, "no labelled queries: set EMBED_EVALUATION to compare")
    spaces = [trial.pipeline] if trial.baseline is None else [trial.baseline, trial.pipeline]
    found = evaluate(spaces, trial.tables, labelled)
    now = found.scores[trial.space].means["ndcg@10"]
    if trial.baseline is None:
        return GateResult("evaluation", True, None, limit, f"nDCG@10 is {now:.3f}; there is no space to compare with")
    change = next(difference for _, difference in found.differences())
    before = found.scores[found.baseline].means["ndcg@10"]
    detail = (
        f"nDCG@10 {before:.3f} before, {now:.3f} now, over {len(labelled.queries):,} queries: "
        f"{change.mean:+.3f} (95 % from {change.low:+.3f} to {change.high:+.3f})"
    )
    passed = change.mean >= limit
    advice = "" if passed else "; look at 'embed-assets evaluate --json', or raise EMBED_MAX_EVALUATION_LOSS"
    return GateResult("evaluation", passed, round(change.mean, 4), limit, detail + advice)


GATES: tuple[Gate, ...] = (
    Gate("coverage", "Every document of the lake is in the space, as it is now.", _coverage),
    Gate("vectors", "Every vector is finite, of unit norm and of the space's dimension.", _vectors),
    Gate("truncated_share", "The share of chunks that the model read only the beginning of.", _truncated),
    Gate("collapse", "The mean cosine of two texts: near 1, all texts get the same vector.", _collapse),
    Gate("effective_rank", "In how many directions vectors vary, in percent of what they could.", _effective_rank),
    Gate("dead_dimensions", "The share of dimensions that are the same for all texts.", _dead_dimensions),
    Gate("near_duplicates", "The share of vectors that are nearly those of a different text.", _near_duplicates),
    Gate("retrieval_probe", "Headings and sentences find their chunks, against the active space.", _retrieval_probe),
    Gate("reproduction", "Chunks that are embedded again get the vectors that are stored.", _reproduction),
    Gate("canaries", "Fixed sentences get the vectors that they got when the space was new.", _canaries),
    Gate("evaluation", "nDCG@10 of the labelled queries of EMBED_EVALUATION, against the active space.", _evaluation),
)

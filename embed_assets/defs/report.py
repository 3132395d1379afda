"""Gathers what the report shows about a lake: from its tables, and from Dagster's records of its runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import dagster as dg

from embed_assets.defs.generations import Survey
from embed_assets.lake.rejections import iter_rejections, rejections_by_reason
from embed_assets.lake.spaces import space_table
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED
from embed_assets.records import utc_now
from embed_assets.report import data
from embed_assets.stages.evaluation import evaluate, load_labels
from embed_assets.stages.generations import pipeline_of
from embed_assets.stages.survey_vectors import VectorSurvey

_EVENTS = 2000
"""Materializations that the runs are taken from, newest first: more take longer to read, about 0.5 s per thousand."""


def gather(survey: Survey, on_step: Callable[[str], None] = lambda name: None) -> data.Report:
    """All that the report shows, of the active space. `on_step` is called with what is looked at next.

    Raises ``LakeError``, ``ModelError`` or ``SettingsError``.
    """
    pipeline = pipeline_of(survey.pipeline, survey.spaces.active or survey.spaces.configured)
    vectors = VectorSurvey(pipeline, survey.tables)
    on_step("reading the vectors")
    tokens, norms, outliers = vectors.tokens(), vectors.norms(), vectors.outliers()
    on_step("drawing the map")
    drawn = vectors.map()
    on_step("looking for duplicates")
    duplicates = vectors.duplicates()
    on_step("searching the copies")
    copies = vectors.copies()
    on_step("evaluating")
    evaluation = _evaluation(survey)
    return data.Report(
        title=survey.history.names.prefix or "Corpus",
        lake=pipeline.lake.root,
        source=pipeline.corpus.source.root,
        space=pipeline.model.space.name,
        model=pipeline.settings.model,
        created_at=utc_now(),
        dimension=vectors.scan.dimension,
        partitions=_partitions(survey, pipeline.model.space.name),
        map=drawn,
        tokens=tokens,
        norms=norms,
        runs=_runs(survey),
        rejections=_rejections(survey),
        generations=_generations(survey),
        evaluation=evaluation,
        duplicates=duplicates,
        outliers=outliers,
        copies=copies,
    )


def _partitions(survey: Survey, space: str) -> tuple[data.Partition, ...]:
    """Counts of each partition, from the tables' logs alone."""
    specs = (RAW, CHUNK_TABLE, space_table(space), REJECTED)
    states = [survey.tables.state(spec) for spec in specs]
    rows = [{key: files.rows for key, files in state.partitions.items()} if state else {} for state in states]
    keys = sorted(set().union(*rows))
    return tuple(data.Partition(key, *(counts.get(key, 0) for counts in rows)) for key in keys)


def _rejections(survey: Survey) -> data.Rejections:
    examples: dict[str, list[data.RejectedDocument]] = defaultdict(list)
    for row in iter_rejections(survey.tables):
        if len(examples[row.reason]) < 5:
            examples[row.reason].append(data.RejectedDocument(row.partition_key, row.document_id, row.detail))
    reasons = rejections_by_reason(survey.tables)
    state = survey.tables.state(RAW)
    return data.Rejections(
        (state.rows if state else 0) + sum(each.count for each in reasons),
        tuple(data.RejectionReason(r.reason, r.count, tuple(examples[r.reason]), r.detail) for r in reasons),
        survey.pipeline.settings.max_rejected_percent,
    )


def _generations(survey: Survey) -> tuple[data.Generation, ...]:
    return tuple(
        data.Generation(
            each.space,
            each.state,
            each.model,
            each.rows,
            each.coverage,
            each.bytes,
            tuple(data.Gate(**asdict(gate)) for gate in each.gates),
        )
        for each in survey.summaries()
    )


def _evaluation(survey: Survey) -> data.Evaluation | data.Absent:
    labelled = load_labels(survey.pipeline.settings, survey.tables)
    pipelines = [pipeline_of(survey.pipeline, space) for space in survey.compared()]
    if labelled is None or not pipelines:
        return data.Absent("No labelled queries: set EMBED_EVALUATION to a file of queries and relevant documents.")
    found = evaluate(pipelines, survey.tables, labelled)
    return data.Evaluation(
        len(labelled.queries),
        tuple(data.SpaceScores(space, *scores.means.values()) for space, scores in found.scores.items()),
        tuple(
            data.Difference(space, found.baseline, each.metric, each.mean, each.low, each.high)
            for space, each in found.differences()
        ),
    )


def _runs(survey: Survey) -> tuple[data.Run, ...]:
    """The latest runs that materialized embeddings, oldest first."""
    key = survey.history.names.key("embeddings")
    found: dict[str, list[tuple[float, dg.AssetMaterialization]]] = defaultdict(list)
    for record in survey.instance.fetch_materializations(key, limit=_EVENTS).records:
        made = record.asset_materialization
        if made is not None and "embedded" in made.metadata:
            found[record.run_id].append((record.timestamp, made))
    runs = [_run(events) for events in found.values()]
    return tuple(sorted(runs, key=lambda run: run.started_at))


def _run(events: Sequence[tuple[float, dg.AssetMaterialization]]) -> data.Run:
    """One run, from its materializations."""
    totals = {name: sum(_number(made, name) for _, made in events) for name in ("embedded", "reused", "tokens")}
    times = [timestamp for timestamp, _ in events]
    busy = [made for _, made in events if _number(made, "tokens")] or [events[0][1]]
    speeds = [_number(made, "tokens_per_second") for made in busy]
    return data.Run(
        datetime.fromtimestamp(min(times), UTC),
        int(totals["embedded"]),
        int(totals["reused"]),
        int(totals["tokens"]),
        sum(speeds) / len(speeds),
        max(times) - min(times) + sum(_number(made, "engine_seconds") for made in busy[:1]),
        str(busy[0].metadata["device"].value),
        str(busy[0].metadata["precision"].value),
    )


def _number(made: dg.AssetMaterialization, name: str) -> float:
    value = made.metadata[name].value if name in made.metadata else 0
    return float(value) if isinstance(value, int | float) else 0.0

"""Everything that the report shows about an embedding lake. Others fill it from the tables; `page` renders it.

A section that was not measured is an `Absent` with a sentence that says why; an empty tuple says that it was measured
and that nothing was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MAX_POINTS = 5000
"""Chunks on a map. More overlap: on a laptop's screen, 5,000 dots of 5 pixels cover a third of the map."""


@dataclass(frozen=True, slots=True)
class Absent:
    """In place of a section: there is nothing to show, and why."""

    why: str
    """A sentence: what is missing, and the setting or command that provides it."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk, and where it is."""

    partition_key: str
    document_id: str
    title: str
    """Title of its document."""
    heading_path: str
    """The headings above it, joined by ' > '."""
    text: str
    """All of it: the page cuts it to a snippet."""


@dataclass(frozen=True, slots=True)
class MapPoint(Passage):
    """A chunk on the map."""

    x: float
    """Its place, in any unit; the same unit for both axes."""
    y: float


@dataclass(frozen=True, slots=True)
class VectorMap:
    """A sample of the chunks, in two dimensions."""

    points: tuple[MapPoint, ...]
    """At most `MAX_POINTS`."""
    chunks: int
    """Chunks that the sample was taken from."""
    method: str
    """How the vectors were projected, as in 't-SNE, perplexity 30'."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A value that should not be passed, as a line in a histogram."""

    value: float
    label: str
    """As in 'the model reads 256'."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How a number is distributed over the chunks."""

    low: float
    """Left end of the first bar."""
    high: float
    """Right end of the last bar."""
    counts: tuple[int, ...]
    """Chunks per bar; the bars are of equal width."""
    smallest: float
    median: float
    largest: float
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One run that materialized embeddings."""

    started_at: datetime
    embedded: int
    """Texts that the model embedded."""
    reused: int
    """Chunks whose vector existed already."""
    tokens: int
    """Tokens that the model read."""
    tokens_per_second: float
    seconds: float
    """Duration of the run."""
    device: str
    precision: str


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition's counts."""

    partition_key: str
    documents: int
    chunks: int
    vectors: int
    """Chunks that have a vector for their current text."""
    rejected: int
    """Documents that could not be read or embedded."""


@dataclass(frozen=True, slots=True)
class RejectedDocument:
    """An example of a rejected document."""

    partition_key: str
    document_id: str
    detail: str
    """What was found."""


@dataclass(frozen=True, slots=True)
class RejectionReason:
    """The documents that were rejected for one reason."""

    reason: str
    """Its code, as in rejected_documents."""
    count: int
    examples: tuple[RejectedDocument, ...]
    advice: str
    """What to do about it, in a sentence."""


@dataclass(frozen=True, slots=True)
class Rejections:
    """The documents that could not be read or embedded, by reason."""

    documents: int
    """Documents read, and rejected ones."""
    reasons: tuple[RejectionReason, ...]
    limit_percent: float | None = None
    """Share of the documents that may be rejected; None: no limit."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition that a generation has to meet before it becomes active."""

    name: str
    passed: bool
    value: float | None
    """What was measured; None if it is not a number."""
    limit: float | None
    """What it is compared with; None if it is not a number."""
    detail: str
    """What was found, in one line."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The vectors of one embedding space."""

    space: str
    state: Literal["active", "building", "ready", "previous", "retired"]
    model: str
    rows: int
    coverage: float
    """Share of the current chunks that have a vector in it, from 0 to 1."""
    size_bytes: int
    """Bytes of its data files."""
    gates: tuple[Gate, ...]


@dataclass(frozen=True, slots=True)
class SpaceScores:
    """How well a space's exact search finds the chunks that the evaluation set names, each score from 0 to 1."""

    space: str
    ndcg_at_10: float
    recall_at_10: float
    mrr: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A space's score less that of another one on the same queries, with its 95 % interval."""

    space: str
    baseline: str
    """The other space."""
    measure: str
    """As in 'nDCG@10'."""
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Search quality by an evaluation set."""

    queries: int
    scores: tuple[SpaceScores, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class RepeatedText:
    """A text that several chunks have."""

    text: str
    count: int
    """Chunks that have it."""
    places: tuple[str, ...]
    """Some documents that it is in."""


@dataclass(frozen=True, slots=True)
class PartitionDuplicates:
    """Chunks of one partition that repeat another one."""

    partition_key: str
    chunks: int
    """All chunks of the partition."""
    repeated: int
    """Those whose text is that of an earlier one of the partition."""
    near: int
    """Those with nearly the vector of a chunk with another text, in any partition."""
    examples: tuple[RepeatedText, ...] = ()


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two chunks with different texts and nearly the same vector."""

    score: float
    """Cosine similarity."""
    first: Passage
    second: Passage


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Chunks that say the same."""

    partitions: tuple[PartitionDuplicates, ...]
    """Those that have some."""
    pairs: tuple[NearPair, ...]
    """Examples of nearly equal texts, of all partitions, best first."""
    cosine: float = 1.0
    """Least cosine similarity of a pair."""
    limit_percent: float | None = None
    """Share of a partition's chunks that may repeat another one; None: no limit."""


@dataclass(frozen=True, slots=True)
class Outlier(Passage):
    """A chunk far from all others."""

    score: float
    """Mean cosine similarity to its nearest neighbours."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """The chunks that are farthest from all others of a sample."""

    neighbors: int
    """Nearest neighbours that a score is the mean of."""
    sampled: int
    """Chunks that were compared."""
    typical: float
    """The median score of the sample."""
    chunks: tuple[Outlier, ...]
    """Farthest first."""


@dataclass(frozen=True, slots=True)
class DerivedCopy:
    """A copy of the vectors in another form, such as an index or a quantized table."""

    kind: str
    bytes_per_vector: float
    recall_at_10: float | None
    """Share of the ten nearest by exact search that a search of the copy finds, from 0 to 1; None: not measured."""
    detail: str = ""
    """Where it is and how it was made, in one line."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows."""

    title: str
    lake: str
    """Root of the tables."""
    source: str
    """Folder or URL of the documents."""
    space: str
    """Name of the embedding space that the map and the distributions are about."""
    model: str
    created_at: datetime
    """UTC."""
    dimension: int | None = None
    """Length of a vector."""
    partitions: tuple[Partition, ...] | Absent = Absent("The partitions were not counted.")
    map: VectorMap | Absent = Absent("No vectors yet: run 'embed-assets sync'.")
    tokens: Histogram | Absent = Absent("No chunks yet: run 'embed-assets sync'.")
    norms: Histogram | Absent = Absent("No vectors yet: run 'embed-assets sync'.")
    runs: tuple[Run, ...] | Absent = Absent("No run is recorded: run 'embed-assets sync'.")
    """Oldest first."""
    rejections: Rejections | Absent = Absent("The rejected documents were not read.")
    generations: tuple[Generation, ...] | Absent = Absent("No generation is recorded: run 'embed-assets sync'.")
    evaluation: Evaluation | Absent = Absent("No evaluation set: set EMBED_EVALUATION to a file of queries.")
    duplicates: Duplicates | Absent = Absent("Duplicates were not looked for.")
    outliers: Outliers | Absent = Absent("Outliers were not looked for.")
    copies: tuple[DerivedCopy, ...] | Absent = Absent("No derived copies: nothing but the Delta table holds vectors.")

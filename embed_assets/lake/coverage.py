"""Measures how much of the documents' text is in the chunks of a partition."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW

SPAN_COLUMNS = ("document_id", "char_start", "char_end")
"""Columns of chunks that tell where they are."""
_POSITION_BITS = 36
"""Bits of a position in a document. The others, but for the sign, number a partition's documents: 134 million."""
_NONE = np.empty(0, np.int64)


@dataclass(slots=True)
class Coverage:
    """How much of the documents' text is in a partition's chunks."""

    documents: int = 0
    """Documents of the partition."""
    uncovered_documents: int = 0
    """Documents with text, other than whitespace, that is in no chunk."""
    uncovered_characters: int = 0
    """Code points, other than whitespace, that are in no chunk."""
    gone_documents: int = 0
    """Documents that have chunks but no longer exist."""


def measure_coverage(partition: PartitionSnapshot) -> Coverage:
    """Compare the chunks' spans with the documents' texts.

    Holds 24 bytes per chunk in memory, twice that while sorting. Raises ``LakeError`` if raw_documents or
    chunks can't be read.
    """
    spans = Spans()
    for batch in partition.rows(CHUNK_TABLE, SPAN_COLUMNS):
        spans.add(batch)
    return spans.coverage(partition.rows(RAW, ["document_id", "text"]))


class Spans:
    """Start and end of each chunk of a partition, by document, as compact arrays."""

    def __init__(self) -> None:
        self._columns = (array("q"), array("q"), array("q"))

    def add(self, chunks: pa.RecordBatch) -> None:
        """Add chunks, with at least the columns `SPAN_COLUMNS`."""
        self._columns[0].frombytes(_short_hashes(chunks.column("document_id")).tobytes())
        for values, name in zip(self._columns[1:], ("char_start", "char_end"), strict=True):
            values.frombytes(chunks.column(name).to_numpy().tobytes())

    def coverage(self, documents: Iterable[pa.RecordBatch]) -> Coverage:
        """How the added chunks cover the documents, given as batches with at least `document_id` and `text`."""
        spans, found = _SortedSpans(*(np.frombuffer(c, np.int64) if c else _NONE for c in self._columns)), Coverage()
        for batch in documents:
            spans.measure(batch, found)
        found.gone_documents = spans.untaken_documents
        return found


class _SortedSpans:
    """Spans in the order of their documents, whose places are the numbers of the documents in that order."""

    def __init__(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        order = np.lexsort((starts, documents))
        self._starts, self._ends = starts[order], ends[order]
        self._documents, self._first = np.unique(documents[order], return_index=True)
        self._is_taken = np.zeros(len(self._documents), bool)
        self._reached, self._is_contiguous = self._measured()

    def measure(self, documents: pa.RecordBatch, found: Coverage) -> None:
        """Count the documents and what of them is in no chunk."""
        places, texts = self._take(documents.column("document_id")), documents.column("text")
        found.documents += documents.num_rows
        for i in np.flatnonzero(~self._are_contiguous(places, pc.utf8_length(texts).to_numpy())).tolist():
            missing = _characters_outside(texts[i].as_py(), self._of(int(places[i])))
            found.uncovered_documents += bool(missing)
            found.uncovered_characters += missing

    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """For each document, how far its chunks reach, and whether they leave no gap up to there."""
        if not len(self._documents):
            return np.empty(0, np.int64), np.empty(0, bool)
        number = np.repeat(np.arange(len(self._first)), np.diff(self._first, append=len(self._starts)))
        # Ends that were reached so far, within each document: its number in the upper bits keeps documents apart.
        reached = np.maximum.accumulate((number << _POSITION_BITS) | self._ends) & ((1 << _POSITION_BITS) - 1)
        before = np.concatenate([[0], reached[:-1]])
        before[self._first] = 0
        has_gap = np.logical_or.reduceat(self._starts > before, self._first)
        return np.maximum.reduceat(reached, self._first), ~has_gap

    def _take(self, document_ids: pa.StringArray) -> np.ndarray:
        """int64, shape (n,): the places of the documents, which count as taken; -1 for those without chunks."""
        names = _short_hashes(document_ids)
        if not len(self._documents):
            return np.full(len(names), -1)
        places = np.minimum(np.searchsorted(self._documents, names), len(self._documents) - 1)
        places = np.where(self._documents[places] == names, places, -1)
        self._is_taken[places[places >= 0]] = True
        return places

    def _are_contiguous(self, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool, shape (n,): whether the chunks of the documents at `places` cover all of their `lengths`, gapless."""
        found = places >= 0
        are = np.zeros(len(places), bool)
        are[found] = self._is_contiguous[places[found]] & (self._reached[places[found]] >= lengths[found])
        return are

    def _of(self, place: int) -> list[tuple[int, int]]:
        """(start, end) of the chunks of the document at a place, in code points, sorted by start; none at -1."""
        if place < 0:
            return []
        first = self._first[place]
        last = self._first[place + 1] if place + 1 < len(self._first) else len(self._starts)
        return list(zip(self._starts[first:last].tolist(), self._ends[first:last].tolist(), strict=True))

    @property
    def untaken_documents(self) -> int:
        """Number of documents with chunks that were not measured."""
        return int((~self._is_taken).sum())


def _short_hashes(document_ids: pa.StringArray) -> np.ndarray:
    """int64, shape (n,): Python's own hashes, which are fast and the same within a process."""
    return np.fromiter(map(hash, document_ids.to_pylist()), np.int64, len(document_ids))


def _characters_outside(text: str, spans: list[tuple[int, int]]) -> int:
    """Number of characters in none of the spans, not counting whitespace."""
    missing = reached = 0
    for start, end in [*sorted(spans), (len(text), len(text))]:
        if start > reached:
            missing += len("".join(text[reached:start].split()))
        reached = max(reached, end)
    return missing

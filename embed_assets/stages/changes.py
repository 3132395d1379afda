"""What changed in a partition's files since they were read, so that all else can be kept.

A row of raw_documents or rejected_documents names the version of the file that it came from. A file is kept if all of
its rows, in both tables, name the version that it has now. Of a file that is read again, the documents are kept whose
rows come out as they are stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import RAW, REJECTED
from embed_assets.records import NOT_EMBEDDABLE, hashes_of

_log = logging.getLogger(__name__)

_MOST_STALE = 1_000_000
"""Documents of a partition that are compared one by one, in about 300 bytes of memory each."""
_HASH = "S16"


@dataclass(frozen=True, slots=True)
class Changes:
    """How a partition's files differ from those that its documents were read from."""

    files: SourcePartition
    """Files that are new or changed."""
    stale: frozenset[str]
    """Ids of the documents whose file changed or is gone."""
    rejected: frozenset[str]
    """Locations of files that did not change, of which something was rejected."""
    known: np.ndarray
    """Sorted hashes of the rows of the stale documents, as `PARSED_DOCUMENTS` has them; 16 bytes each."""

    def as_before(self, documents: pa.RecordBatch) -> list[str]:
        """Ids of the documents, given as rows of `PARSED_DOCUMENTS`, that come out as they are stored."""
        names: list[str] = documents.column("document_id").filter(is_known(documents, self.known)).to_pylist()
        return names


def row_keys(documents: pa.RecordBatch) -> np.ndarray:
    """The column `row_hash` as an array of shape (n,) that can be sorted and searched."""
    return np.frombuffer(hashes_of(documents, ()), _HASH)


def is_known(documents: pa.RecordBatch, known: np.ndarray) -> pa.BooleanArray:
    """For each row of `PARSED_DOCUMENTS`, whether its hash is among the sorted `known` ones."""
    hashes = row_keys(documents)
    if not len(known):
        return pa.array(np.zeros(len(hashes), bool))
    return pa.array(known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes)


@dataclass(frozen=True)
class ChangeFinder:
    """Finds what changed in partitions, one by one."""

    tables: Snapshot
    """The lake as it was when the source was listed."""
    source: Source
    is_as_recorded: Callable[[PartitionSnapshot], bool]
    """Whether the rows that the lake has of a partition can be trusted."""

    def find(self, files: SourcePartition) -> Changes | None:
        """The changes of a partition; None if all of it has to be read.

        Reads a few short columns of its documents, and none of their texts.
        """
        partition = self.tables.partition(files.key)
        try:
            return self._find(partition, files) if self.is_as_recorded(partition) else None
        except LakeError as error:
            _log.warning("partition %r: all of it is read, as what changed can't be told: %s", files.key, error)
            return None

    def _find(self, partition: PartitionSnapshot, files: SourcePartition) -> Changes | None:
        uris = [self.source.uri(file) for file in files.files]
        now = {uri: file.content_key for uri, file in zip(uris, files.files, strict=True)}
        kept_rejections, changed = _rejected_files(partition, now)
        kept, stale = set[str](), set[str]()
        for document_id, uri, version in _rows(partition, ("document_id", "uri", "file_version")):
            if version is not None and now.get(uri) == version and uri not in changed:
                kept.add(uri)
            else:
                stale.add(document_id)
                changed.add(uri)
            if len(stale) > _MOST_STALE:
                return None
        if not kept.isdisjoint(changed):  # rows of two versions of a file
            return None
        kept |= kept_rejections - changed
        unread = tuple(file for uri, file in zip(uris, files.files, strict=True) if uri not in kept)
        known = _hashes(partition.only(stale))
        return Changes(replace(files, files=unread), frozenset(stale), frozenset(kept & kept_rejections), known)


def _rejected_files(partition: PartitionSnapshot, now: dict[str, str | None]) -> tuple[set[str], set[str]]:
    """Locations of the files with rejections: of those that are as they were, and of the others."""
    kept, changed = set[str](), set[str]()
    for batch in partition.rows(REJECTED, ("uri", "file_version", "reason")):
        for uri, version, reason in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if reason != NOT_EMBEDDABLE:  # those are of a model, not of a file
                (kept if version is not None and now.get(uri) == version else changed).add(uri)
    return kept - changed, changed


def _rows(partition: PartitionSnapshot, columns: Iterable[str]) -> Iterator[tuple[str, ...]]:
    for batch in partition.rows(RAW, tuple(columns)):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _hashes(documents: PartitionSnapshot) -> np.ndarray:
    """The sorted hashes of the rows of documents."""
    columns = documents.lake.full(RAW).content_columns
    found = b"".join(hashes_of(batch, columns) for batch in documents.rows(RAW, columns))
    return np.sort(np.frombuffer(found, _HASH))

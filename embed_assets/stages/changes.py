"""What changed in the files of partitions since they were read, so that all else can be kept.

A row of raw_documents or rejected_documents names the version of the file that it came from. A file is kept if there
are rows of that version: they are complete, because a partition's rows are committed together. Of a file that is read
again, the documents are kept whose rows come out as they are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import RAW, REJECTED, TableSpec, is_one_of
from embed_assets.records import CONTENT_COLUMNS, hashes_of, packed_hashes

_MOST_VALUES = 500
"""Partitions or documents that are looked up by name. For more, one pass over the whole table is faster."""
_MOST_STALE = 1_000_000
"""Documents of a partition that are compared one by one, in about 300 bytes of memory each."""


@dataclass(frozen=True, slots=True)
class Changes:
    """How a partition's files differ from those that its documents were read from."""

    files: SourcePartition
    """Files that are new or changed."""
    stale: frozenset[str]
    """Ids of the documents whose file changed or is gone."""
    kept: frozenset[str]
    """Locations of the files that did not change."""
    known: pa.FixedSizeBinaryArray
    """Hashes of the rows of the stale documents, as `PARSED_DOCUMENTS` has them."""

    def as_before(self, documents: pa.RecordBatch) -> list[str]:
        """Ids of the documents, given as rows of `PARSED_DOCUMENTS`, that come out as they are stored."""
        names: list[str] = documents.column("document_id").filter(is_known(documents, self.known)).to_pylist()
        return names


def is_known(documents: pa.RecordBatch, known: pa.FixedSizeBinaryArray) -> pa.BooleanArray:
    """For each row of `PARSED_DOCUMENTS`, whether its hash is among the `known` ones."""
    return pc.is_in(documents.column("row_hash"), value_set=known)


def find_changes(tables: Snapshot, source: Source, partitions: Sequence[SourcePartition]) -> dict[str, Changes]:
    """The changes of partitions, by key, but for those in which too much changed.

    Reads a few short columns of the partitions' documents, and none of their texts.
    """
    stored = {files.key: _Stored(source, files) for files in partitions}
    for table in (RAW, REJECTED) if stored else ():
        for key, rows in _rows(tables, table, ("document_id", "uri", "file_version"), partition_key=stored):
            if key in stored:
                stored[key].add(table, rows)
    few = {key: found for key, found in stored.items() if len(found.stale) <= _MOST_STALE}
    documents = {name for found in few.values() for name in found.stale}
    columns = CONTENT_COLUMNS["raw_documents"]
    for key, rows in _rows(tables, RAW, columns, partition_key=few, document_id=documents) if documents else ():
        if key in few:
            few[key].add_content(rows)
    return {key: found.changes() for key, found in few.items()}


class _Stored:
    """What a partition's rows say of the files that they came from."""

    def __init__(self, source: Source, files: SourcePartition) -> None:
        self._files = files
        self._uris = [source.uri(file) for file in files.files]
        versions = ((uri, file.content_key) for uri, file in zip(self._uris, files.files, strict=True))
        self._now = pa.array([None if key is None else f"{uri}\n{key}" for uri, key in versions], pa.string())
        self._kept: set[str] = set()
        self._hashes = bytearray()
        self.stale: set[str] = set()
        """Ids of the documents whose file changed or is gone."""

    def add(self, table: TableSpec, rows: pa.RecordBatch) -> None:
        """Add rows of a table, with the columns document_id, uri and file_version."""
        files = pc.binary_join_element_wise(rows.column("uri"), rows.column("file_version"), "\n")
        is_kept = pc.fill_null(pc.is_in(files, value_set=self._now, skip_nulls=True), False)
        self._kept.update(rows.column("uri").filter(is_kept).unique().to_pylist())
        if table is RAW:
            self.stale.update(rows.column("document_id").filter(pc.invert(is_kept)).to_pylist())

    def add_content(self, rows: pa.RecordBatch) -> None:
        """Add rows of documents, with the columns that decide whether two are equal."""
        is_stale = np.fromiter(map(self.stale.__contains__, rows.column("document_id").to_pylist()), bool)
        self._hashes += hashes_of(rows.filter(pa.array(is_stale)), CONTENT_COLUMNS["raw_documents"])

    def changes(self) -> Changes:
        """The changes, once all rows were added."""
        pairs = zip(self._uris, self._files.files, strict=True)
        files = replace(self._files, files=tuple(file for uri, file in pairs if uri not in self._kept))
        return Changes(files, frozenset(self.stale), frozenset(self._kept), packed_hashes(bytes(self._hashes)))


def _rows(
    tables: Snapshot, table: TableSpec, columns: Iterable[str], **wanted: Collection[str]
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Partition key and rows of a table, of at least those with the `wanted` values, if these are few."""
    few = [is_one_of(name, values) for name, values in wanted.items() if len(values) <= _MOST_VALUES]
    for batch in tables.rows(table, ["partition_key", *columns], " AND ".join(few) or None):
        encoded = batch.column("partition_key").dictionary_encode()
        for number, key in enumerate(encoded.dictionary.to_pylist()):
            yield key, batch.filter(pc.equal(encoded.indices, number))

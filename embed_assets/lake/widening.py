"""Widens search results to the text around them: neighbouring chunks, or the section that a chunk is in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from embed_assets.lake.filters import all_of, one_of
from embed_assets.lake.row_source import RowSource, StoredRows
from embed_assets.lake.search import SearchResult, read_places
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import RAW

Width: TypeAlias = int | Literal["section"]
"""Chunks to take before and after one, or all that are below its heading."""
_Document: TypeAlias = tuple[str, str]
"""Partition key and document id."""


@dataclass(frozen=True, slots=True)
class _Span:
    """A chunk's place in its document."""

    index: int
    heading_path: str
    start: int
    end: int


def widened(
    source: RowSource, tables: Snapshot, found: Sequence[Sequence[SearchResult]], width: Width
) -> list[list[SearchResult]]:
    """The results with their `context`: the document's own text, from the first of the chunks to the last.

    Of a document that has changed since its chunks were embedded, a result's context is its own text. Raises
    ``LakeError``.
    """
    documents = {_document(result) for results in found for result in results}
    spans, texts = _spans(source, documents), _texts(tables, documents)
    return [
        [replace(r, context=_context(r, spans[_document(r)], texts.get(_document(r), ""), width)) for r in results]
        for results in found
    ]


def _document(result: SearchResult) -> _Document:
    return result.partition_key, result.document_id


def _spans(source: RowSource, documents: set[_Document]) -> dict[_Document, list[_Span]]:
    """Of each document its chunks, in order."""
    found: defaultdict[_Document, list[_Span]] = defaultdict(list)
    columns = ["partition_key", "document_id", "chunk_index", "heading_path", "char_start", "char_end"]
    for batch in read_places(source, columns, set(documents)):
        for key, name, *values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if (key, name) in documents:
                found[key, name].append(_Span(*values))
    return {document: sorted(spans, key=lambda span: span.index) for document, spans in found.items()}


def _texts(tables: Snapshot, documents: set[_Document]) -> dict[_Document, str]:
    found: dict[_Document, str] = {}
    if documents:
        keys, names = zip(*documents, strict=True)
        keep = all_of(one_of("partition_key", keys), one_of("document_id", names))
        for batch in StoredRows(tables, RAW).read(["partition_key", "document_id", "text"], keep):
            for key, name, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if (key, name) in documents:
                    found[key, name] = text
    return found


def _context(result: SearchResult, spans: Sequence[_Span], text: str, width: Width) -> str:
    if text[result.char_start : result.char_end] != result.text:
        return result.text
    here = next(i for i, span in enumerate(spans) if (span.start, span.end) == (result.char_start, result.char_end))
    if width == "section":
        first = last = here
        while first and _is_below(spans[first - 1].heading_path, result.heading_path):
            first -= 1
        while last + 1 < len(spans) and _is_below(spans[last + 1].heading_path, result.heading_path):
            last += 1
    else:
        first, last = max(0, here - width), min(len(spans) - 1, here + width)
    return text[spans[first].start : max(span.end for span in spans[first : last + 1])]


def _is_below(path: str, heading_path: str) -> bool:
    """Whether a chunk with this path is in the section of that one."""
    return path == heading_path or (bool(heading_path) and path.startswith(f"{heading_path} > "))

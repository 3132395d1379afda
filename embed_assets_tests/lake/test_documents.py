"""Replacing the rows of some of a partition's documents, with real Delta tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.errors import SupersededError
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, Lake
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import CONTENT_COLUMNS, ContentVersion, chunk_ids, hash_text

RUN = Provenance("run-1")
NAMES = ("a.md", "b.md", "c/d.md", "it's 'quoted'.md", "é%20;--.md")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def rows_of(documents: Mapping[str, Sequence[str]], key: str = "k") -> pa.RecordBatch:
    """Chunks with the given texts, by document."""
    rows = [
        {
            "partition_key": key, "chunk_id": chunk_id, "document_id": name, "chunk_index": i, "text": text,
            "heading_path": "", "char_start": 0, "char_end": 1, "token_count": 3, "text_hash": hash_text(text),
        }
        for name, texts in documents.items()
        for i, (text, chunk_id) in enumerate(zip(texts, chunk_ids(name, [hash_text(t) for t in texts]), strict=True))
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=CHUNK_TABLE.schema)


def begin(lake: Lake, key: str = "k") -> PartitionSnapshot:
    partition = Snapshot(lake).partition(key)
    partition.state(CHUNK_TABLE)
    return partition


def write(lake: Lake, documents: Mapping[str, Sequence[str]], key: str = "k") -> Replaced:
    return begin(lake, key).replace(CHUNK_TABLE, [rows_of(documents, key)], RUN)


def update(
    partition: PartitionSnapshot,
    previous: str,
    names: Sequence[str],
    new: Mapping[str, Sequence[str]],
    check: Callable[[], None] = lambda: None,
) -> Replaced:
    """Replace the rows of the documents `names` by those of `new`."""
    provenance = replace(RUN, previous=previous)
    return partition.replace(CHUNK_TABLE, [rows_of(new, partition.key)], provenance, check, documents=names)


def stored(lake: Lake, key: str = "k") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for batch in begin(lake, key).rows(CHUNK_TABLE, ["document_id", "text"]):
        for name, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            found.setdefault(name, []).append(text)
    return {name: sorted(texts) for name, texts in found.items()}


TEXTS = st.lists(st.sampled_from(["one", "two", "three"]), max_size=3).map(sorted)


FILLER = {"filler.md": [f"text {i}" for i in range(6000)]}
"""So many rows that data files are rewritten instead of all of the partition."""
OTHERS = tuple(f"gone {i}" for i in range(1001))
"""So many documents that all of the partition is rewritten."""


@settings(deadline=None, max_examples=15)
@given(before=st.dictionaries(st.sampled_from(NAMES), TEXTS), after=st.dictionaries(st.sampled_from(NAMES), TEXTS))
@pytest.mark.parametrize(("filler", "others"), [({}, ()), (FILLER, ()), (FILLER, OTHERS)])
def test_it_gives_the_rows_and_the_version_of_replacing_everything(
    filler: dict[str, list[str]],
    others: tuple[str, ...],
    before: dict[str, list[str]],
    after: dict[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    lake, other = (Lake(str(tmp_path_factory.mktemp("lake"))) for _ in range(2))
    for place in (lake, other):
        write(place, {"a.md": ["of another partition"]}, "other")
    first = write(lake, before | filler)
    changed = sorted(before.keys() | after.keys())[::2]
    new = {name: after[name] for name in changed if name in after}
    expected = {name: texts for name, texts in before.items() if name not in changed} | new | filler
    made = update(begin(lake), first.data_version, [*changed, *others], new)
    whole = write(other, expected)
    assert stored(lake) == stored(other) == {name: sorted(texts) for name, texts in expected.items() if texts}
    assert (made.data_version, made.rows) == (whole.data_version, whole.rows)
    assert begin(lake).tables.content(CHUNK_TABLE, "k") == made.data_version
    assert begin(lake).holds(CHUNK_TABLE, made.data_version, made.state.files_hash)
    assert made.is_committed == (made.data_version != first.data_version)
    assert stored(lake, "other") == {"a.md": ["of another partition"]}


def test_a_version_of_rows_follows_from_what_came_and_went() -> None:
    columns = CONTENT_COLUMNS["chunks"]
    whole = ContentVersion(columns)
    whole.add(rows_of({"a": ["1", "2"], "b": ["3"]}))
    changed = ContentVersion(columns, whole.text())
    changed.remove(rows_of({"a": ["1", "2"]}))
    changed.add(rows_of({"c": ["4"]}))
    expected = ContentVersion(columns)
    for batch in (rows_of({"c": ["4"]}), rows_of({"b": ["3"]})):
        expected.add(batch)
    assert changed.text() == expected.text() != whole.text()
    twice = ContentVersion(columns)
    for _ in range(2):
        twice.add(rows_of({"b": ["3"]}))
    assert len({version.text() for version in (twice, expected, whole, ContentVersion(columns))}) == 4


@pytest.mark.parametrize("other", [{"a.md": ["theirs"]}, {"z.md": ["theirs"]}, {}])
def test_a_partition_that_another_run_replaced_meanwhile_is_left_to_it(lake: Lake, other: dict[str, list[str]]) -> None:
    first = write(lake, {"a.md": ["1"], "b.md": ["2"]})
    mine = begin(lake)
    write(lake, other)
    with pytest.raises(SupersededError, match="another run replaced its chunks"):
        update(mine, first.data_version, ["a.md"], {"a.md": ["new"]})
    assert stored(lake) == other


@pytest.mark.parametrize("their", ["a.md", "y.md"])
def test_a_commit_of_other_documents_between_check_and_commit_is_noticed(lake: Lake, their: str) -> None:
    """Delta takes commits for compatible whose documents are apart: here z.md is new, and so is y.md."""
    first = write(lake, {"a.md": ["1"]} | FILLER)
    mine, calls = begin(lake), []

    def check() -> None:
        mine.require_current(CHUNK_TABLE)
        calls.append(1)
        if len(calls) == 1:
            mine.require_current = lambda *tables: None  # type: ignore[method-assign]
            update(begin(lake), first.data_version, [their], {their: ["theirs"]})

    with pytest.raises(SupersededError):
        update(mine, first.data_version, ["z.md"], {"z.md": ["mine"]}, check)


@pytest.mark.parametrize("filler", [{}, FILLER])
def test_a_commit_to_another_partition_does_not_matter(lake: Lake, filler: dict[str, list[str]]) -> None:
    first = write(lake, {"a.md": ["1"]} | filler)
    mine = begin(lake)
    write(lake, {"b.md": ["before"]}, "other")
    made = update(
        mine, first.data_version, ["a.md"], {"a.md": ["2"]}, lambda: void(write(lake, {"b.md": ["other"]}, "other"))
    )
    assert made.is_committed
    assert stored(lake)["a.md"] == ["2"]


def void(_: object) -> None:
    """Nothing."""


def test_compaction_does_not_count_as_a_change(lake: Lake) -> None:
    first = write(lake, {"a.md": ["1"]} | FILLER)
    second = update(begin(lake), first.data_version, ["b.md"], {"b.md": ["2"]})
    assert len(begin(lake).state(CHUNK_TABLE).files) == 2
    table = lake.open(CHUNK_TABLE)
    assert table is not None
    table.optimize.compact()
    assert len(begin(lake).state(CHUNK_TABLE).files) == 1
    assert begin(lake).holds(CHUNK_TABLE, second.data_version, second.state.files_hash)
    assert not begin(lake).holds(CHUNK_TABLE, first.data_version, first.state.files_hash)

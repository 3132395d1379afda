"""The lake, with real Delta tables in a temporary folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, Field, write_deltalake
from deltalake.exceptions import DeltaError
from deltalake.schema import PrimitiveType
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.staging import Staging, remove_windows, stale_windows
from embed_assets.lake.tables import (
    CHUNK_TABLE,
    RAW,
    REJECTED,
    Lake,
    TableSpec,
    columns_of,
    dimension_of,
    partition_predicate,
)
from embed_assets.lake.vectors import VECTOR_COLUMNS, HashIndex, VectorStore, hash_keys, vector_batch
from embed_assets.lake.verify import verify
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import CHUNKS, EMBEDDINGS, REJECTED_ROWS, chunk_ids, hash_text, utc_now

SPACE = TableSpec("embeddings", "space", {"embed_assets.model": "test"})
RUN = Provenance("run-1", {"upstream": "v1"})


class TextAlone:
    """A model that gets a chunk's text and nothing else."""

    has_title = False

    def of(self, text: str, title: str, heading_path: str) -> str:
        return text


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def replace_partition(
    lake: Lake, table: TableSpec, key: str, batches: Iterable[pa.RecordBatch], provenance: Provenance, **options: Any
) -> Replaced:
    """Replace a partition's rows in a separate run."""
    return Snapshot(lake).partition(key).replace(table, batches, provenance, **options)


def rejections(key: str, *names: str) -> list[pa.RecordBatch]:
    rows = [
        {"partition_key": key, "document_id": n, "uri": "u", "reason": "empty", "detail": "d", "rejected_at": utc_now()}
        for n in names
    ]
    return [pa.RecordBatch.from_pylist(rows, schema=REJECTED_ROWS)]


def names(lake: Lake, key: str | None = None) -> list[str]:
    predicate = None if key is None else partition_predicate(key)
    return sorted(n for b in Snapshot(lake).rows(REJECTED, ["document_id"], predicate) for n in b.column(0).to_pylist())


def test_replacing_one_partition_leaves_the_others(lake: Lake) -> None:
    for key in ("a", "o'x; DROP=1 é %2F", "b c/d=e"):
        replace_partition(lake, REJECTED, key, rejections(key, f"{key}-1", f"{key}-2"), RUN)
    replaced = replace_partition(lake, REJECTED, "a", rejections("a", "new"), RUN)
    assert (replaced.rows, replaced.is_committed) == (1, True)
    assert names(lake, "a") == ["new"]
    assert names(lake, "o'x; DROP=1 é %2F") == ["o'x; DROP=1 é %2F-1", "o'x; DROP=1 é %2F-2"]
    assert Snapshot(lake).keys(REJECTED) == {"a", "o'x; DROP=1 é %2F", "b c/d=e"}


def test_equal_content_in_another_order_or_at_another_time_is_not_committed(lake: Lake) -> None:
    first = replace_partition(lake, REJECTED, "a", rejections("a", "x", "y"), RUN)
    again = replace_partition(lake, REJECTED, "a", rejections("a", "y", "x"), RUN)
    assert (again.is_committed, again.data_version) == (False, first.data_version)
    assert Snapshot(lake).version(REJECTED) == first.table_version
    assert replace_partition(lake, REJECTED, "a", rejections("a", "y", "x"), RUN.rewriting()).is_committed


def test_writing_no_rows_empties_the_partition_and_needs_no_table(lake: Lake) -> None:
    assert replace_partition(lake, REJECTED, "a", [], RUN).table_version is None
    replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)
    assert replace_partition(lake, REJECTED, "a", [], RUN).is_committed
    assert names(lake) == []


def test_a_failure_while_rows_are_produced_changes_nothing(lake: Lake) -> None:
    replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)

    def broken() -> object:
        yield from rejections("a", "y")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        replace_partition(lake, REJECTED, "a", broken(), RUN)  # type: ignore[arg-type]
    assert names(lake) == ["x"]


def test_rows_of_another_partition_are_refused(lake: Lake) -> None:
    with pytest.raises(LakeError, match="can't be written"):
        replace_partition(lake, REJECTED, "a", rejections("b", "x"), RUN)


def test_commits_name_their_run(lake: Lake) -> None:
    replaced = replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)
    history = DeltaTable(lake.uri(REJECTED)).history(1)[0]["embed_assets"]
    assert history["run_id"] == "run-1"
    assert history["input_versions"] == {"upstream": "v1"}
    assert (history["rows"], history["data_version"]) == (1, replaced.data_version)


def embeddings(key: str, vectors: np.ndarray, texts: list[str] | None = None) -> pa.RecordBatch:
    texts = texts or [f"text {i}" for i in range(len(vectors))]
    ids = chunk_ids("doc", [hash_text(t) for t in texts])
    rows = [
        {
            "partition_key": key, "chunk_id": chunk_id, "document_id": "doc", "chunk_index": i, "uri": "u",
            "title": "t", "text": text, "heading_path": "", "char_start": 0, "char_end": 1, "token_count": 3,
            "is_truncated": False, "input_hash": hash_text(text),
            "embedding": vector.tolist(), "embedded_at": utc_now(),
        }
        for i, (text, chunk_id, vector) in enumerate(zip(texts, ids, vectors, strict=True))
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=SPACE.schema)


def chunks(key: str, texts: list[str]) -> pa.RecordBatch:
    hashes = [hash_text(t) for t in texts]
    rows = [
        {
            "partition_key": key, "chunk_id": chunk_id, "document_id": "doc", "chunk_index": i, "text": text,
            "heading_path": "", "char_start": 0, "char_end": 1, "token_count": 3, "text_hash": text_hash,
        }
        for i, (text, text_hash, chunk_id) in enumerate(zip(texts, hashes, chunk_ids("doc", hashes), strict=True))
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=CHUNK_TABLE.schema)


def write_chunks(lake: Lake, key: str) -> None:
    """Write `TEXTS` as chunks, and the document that they belong to."""
    document = {
        "partition_key": key, "document_id": "doc", "uri": "u", "media_type": "text/plain", "title": "", "text": "t",
        "content_hash": hash_text("t"), "byte_size": 1, "modified_at": utc_now(), "metadata": "{}",
    }  # fmt: skip
    replace_partition(lake, RAW, key, [pa.RecordBatch.from_pylist([document], schema=RAW.schema)], RUN)
    replace_partition(lake, CHUNK_TABLE, key, [chunks(key, TEXTS)], RUN)


def unit(rows: int, dimension: int = 4, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def test_the_dimension_is_a_constraint_and_the_space_is_described(lake: Lake) -> None:
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(2))], RUN, dimension=4)
    table = lake.open(SPACE)
    assert table is not None
    assert dimension_of(table) == 4
    assert table.metadata().configuration["embed_assets.model"] == "test"
    with pytest.raises(LakeError, match="can't be written"):
        replace_partition(lake, SPACE, "b", [embeddings("b", unit(2, 5))], RUN, dimension=5)
    with pytest.raises(DeltaError):
        write_deltalake(lake.uri(SPACE), pa.Table.from_batches([embeddings("b", unit(2, 3))]), mode="append")
    assert Snapshot(lake).keys(SPACE) == {"a"}


def test_vectors_come_back_as_lists_of_float32_for_other_readers(lake: Lake) -> None:
    import polars

    vectors = unit(50)
    replace_partition(lake, SPACE, "a", [embeddings("a", vectors)], RUN, dimension=4)
    frame = polars.scan_delta(lake.uri(SPACE)).select("chunk_index", "embedding").sort("chunk_index").collect()
    assert frame.schema["embedding"] == polars.List(polars.Float32)
    assert (np.array(frame["embedding"].to_list(), dtype=np.float32) == vectors).all()


def test_reading_tables_does_not_abort_at_exit(lake: Lake) -> None:
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(50))], RUN, dimension=4)
    code = (
        "import sys; from embed_assets.lake.tables import *; from embed_assets.lake.snapshot import Snapshot; "
        "rows = Snapshot(Lake(sys.argv[1])).rows(TableSpec('embeddings', 'space'), ['embedding']); "
        "print(sum(b.num_rows for b in rows))"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, lake.root], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "50"


def test_a_lake_that_is_a_file_or_damaged_is_a_one_line_error(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LakeError, match="must be a writable folder"):
        Lake(str(tmp_path / "file")).check_usable(SPACE)
    replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)
    log = next(Path(lake.uri(REJECTED)).glob("_delta_log/*1.json"))
    log.write_text("{broken")
    with pytest.raises(LakeError, match="rejected_documents"):
        names(lake)


@given(
    order=st.permutations(range(40)),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
@settings(max_examples=30, deadline=None)
def test_the_vector_store_returns_what_was_put_in(order: list[int], batches: list[int]) -> None:
    hashes = [hash_text(str(i)) for i in range(40)]
    vectors = unit(40, 6)
    with VectorStore() as store:
        start = 0
        for size in [*batches, 40]:
            part = slice(start, min(40, start + size))
            store.add(vector_batch(hashes[part], vectors[part], np.arange(40)[part] % 2 == 0, utc_now()))
            start = part.stop
            if start == 40:
                break
        assert len(store) == 40
        found = store.get(hash_keys([hashes[i] for i in order]))
        assert (found.vectors == vectors[list(order)]).all()
        assert found.is_truncated.tolist() == [i % 2 == 0 for i in order]
        assert store.has(hash_keys(["0" * 32, hashes[0]])).tolist() == [False, True]


def test_the_vector_store_skips_unusable_vectors() -> None:
    vectors = unit(3)
    vectors[1, 2] = np.nan
    with VectorStore() as store:
        store.add(vector_batch([hash_text(c) for c in "abc"], vectors, np.zeros(3, bool), utc_now()))
        assert store.has(hash_keys([hash_text(c) for c in "abc"])).tolist() == [True, False, True]


@given(st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_hash_index_finds_what_was_added(batches: list[list[int]]) -> None:
    hashes = [f"{i:02x}" * 15 + "00" for i in range(61)]  # hashes that end in zero bytes are no exception
    index, expected = HashIndex(), dict[int, int]()
    for batch in batches:
        keys = hash_keys([hashes[i] for i in batch])
        is_new = index.is_new(keys)
        assert is_new.tolist() == [i not in expected and i not in batch[:n] for n, i in enumerate(batch)]
        index.add(keys[is_new], first=len(index))
        for i in dict.fromkeys(batch):
            expected.setdefault(i, len(expected))
        assert len(index) == len(expected)
    assert index.find(hash_keys(hashes)).tolist() == [expected.get(i, -1) for i in range(61)]


def test_staged_windows_survive_and_are_cleared(lake: Lake) -> None:
    staging = Staging(lake, SPACE, "o'x")
    assert list(staging.read()) == []
    for name in "ab":
        staging.write(vector_batch([hash_text(name)], unit(1), np.zeros(1, bool), utc_now()))
    again = Staging(lake, SPACE, "o'x")
    assert sorted(b.column("input_hash")[0].as_py() for b in again.read()) == sorted(map(hash_text, "ab"))
    assert all(tuple(b.schema.names) == VECTOR_COLUMNS for b in again.read())
    assert list(Staging(lake, SPACE, "other").read()) == []
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(2))], RUN, dimension=4)
    assert sum(b.num_rows for b in Snapshot(lake).rows(SPACE, ["chunk_id"])) == 2
    again.clear()
    assert list(again.read()) == []


def test_only_old_windows_are_removed(lake: Lake) -> None:
    staging = Staging(lake, SPACE, "a")
    staging.write(vector_batch([hash_text("a")], unit(1), np.zeros(1, bool), utc_now()))
    assert stale_windows(lake, SPACE, timedelta(hours=1)) == []
    [file] = Path(lake.root, SPACE.path, "_staging").iterdir()
    os.utime(file, (1, 1))
    stale = stale_windows(lake, SPACE, timedelta(hours=1))
    assert [f.path for f in stale] == [f"{SPACE.path}/_staging/{file.name}"]
    remove_windows(lake, stale)
    assert list(staging.read()) == []


@pytest.mark.parametrize("damage", [b"", b"no Arrow", b"truncated"])
def test_damaged_windows_are_logged_and_skipped(lake: Lake, logged: list[str], damage: bytes) -> None:
    staging = Staging(lake, SPACE, "a")
    for name in "ab":
        staging.write(vector_batch([hash_text(name)], unit(1), np.zeros(1, bool), utc_now()))
    file = next(Path(lake.root, SPACE.path, "_staging").iterdir())
    file.write_bytes(file.read_bytes()[:-200] if damage == b"truncated" else damage)
    assert sum(batch.num_rows for batch in staging.read()) == 1
    assert any(file.name in line and "damaged" in line for line in logged)


def test_looking_for_windows_does_not_create_a_lake(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "none"))
    assert (list(Staging(lake, SPACE, "a").read()), lake.spaces()) == ([], [])
    assert not (tmp_path / "none").exists()


def reading(lake: Lake, key: str, *tables: TableSpec) -> PartitionSnapshot:
    """A run that has started to read a partition."""
    work = Snapshot(lake).partition(key)
    for table in tables:
        work.state(table)
    return work


def test_older_rows_do_not_replace_newer_ones(lake: Lake) -> None:
    """Two runs chunk one partition; the one that read older documents commits last."""
    write_chunks(lake, "a")
    older = reading(lake, "a", CHUNK_TABLE)
    replace_partition(lake, CHUNK_TABLE, "a", [chunks("a", ["newer"])], RUN)
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(1), ["newer"])], RUN, dimension=4)
    with pytest.raises(SupersededError, match="another run replaced its chunks"):
        older.replace(SPACE, [embeddings("a", unit(2))], RUN, lambda: older.require_current(CHUNK_TABLE))
    assert [r["text"] for b in Snapshot(lake).rows(SPACE, ["text"]) for r in b.to_pylist()] == ["newer"]


def test_a_commit_between_the_check_and_ours_is_detected(lake: Lake) -> None:
    """The check sees nothing, then another run replaces inputs and rows; our commit comes last and is refused."""
    write_chunks(lake, "a")
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(1), ["old"])], RUN, dimension=4)
    mine = reading(lake, "a", CHUNK_TABLE)
    has_raced = False

    def check_then_race() -> None:
        nonlocal has_raced
        mine.require_current(CHUNK_TABLE)
        if not has_raced:
            has_raced = True
            replace_partition(lake, CHUNK_TABLE, "a", [chunks("a", ["newer"])], RUN)
            replace_partition(lake, SPACE, "a", [embeddings("a", unit(1), ["newer"])], RUN)

    with pytest.raises(SupersededError):
        mine.replace(SPACE, [embeddings("a", unit(2))], RUN, check_then_race)
    assert [r["text"] for b in Snapshot(lake).rows(SPACE, ["text"]) for r in b.to_pylist()] == ["newer"]


def test_inputs_are_unchanged_by_other_partitions_and_by_compaction(lake: Lake) -> None:
    write_chunks(lake, "a")
    read = reading(lake, "a", CHUNK_TABLE, RAW)
    write_chunks(lake, "b")
    read.require_current(CHUNK_TABLE, RAW)
    delta = DeltaTable(lake.uri(CHUNK_TABLE))
    rewritten = pa.RecordBatchReader.from_stream(delta.scan(predicate=partition_predicate("a"))).read_all()
    write_deltalake(delta, rewritten, mode="overwrite", predicate=partition_predicate("a"))
    read.require_current(CHUNK_TABLE, RAW)


def test_a_snapshot_stays_as_it_was_first_read(lake: Lake) -> None:
    replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)
    tables = Snapshot(lake)

    def found() -> list[str]:
        return [n for b in tables.rows(REJECTED, ["document_id"]) for n in b.column(0).to_pylist()]

    assert found() == ["x"]
    replace_partition(lake, REJECTED, "a", rejections("a", "y"), RUN)
    assert found() == ["x"] and tables.version(REJECTED) == 1
    assert names(lake) == ["y"]


class Counting(Lake):
    """A lake that records which tables are opened."""

    opened: ClassVar[list[str]] = []

    def open_path(self, path: str, version: int | None = None) -> DeltaTable | None:
        Counting.opened.append(path)
        return super().open_path(path, version)


def test_a_session_opens_a_table_once_and_brings_it_up_to_date(lake: Lake) -> None:
    replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)
    session = Counting(lake.root).session()
    Counting.opened.clear()
    for expected in ("x", "y"):
        with Snapshot(session) as tables:
            found = [n for b in tables.rows(REJECTED, ["document_id"]) for n in b.column(0).to_pylist()]
            assert found == [expected]
        replace_partition(lake, REJECTED, "a", rejections("a", "y"), RUN)
    assert Counting.opened == ["rejected_documents"]


def test_snapshots_of_a_session_share_no_open_table(lake: Lake) -> None:
    replace_partition(lake, REJECTED, "a", rejections("a", "x"), RUN)
    session = lake.session()
    first, second = Snapshot(session), Snapshot(session)
    assert first.table(REJECTED) is not second.table(REJECTED)
    first.close()
    second.close()
    third, fourth = Snapshot(session), Snapshot(session)
    assert third.table(REJECTED) is not fourth.table(REJECTED)


def test_a_session_drops_a_table_that_was_updated_many_times(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embed_assets.lake.tables._MAX_UPDATES", 2)
    replace_partition(lake, REJECTED, "a", rejections("a", "0"), RUN)
    session = Counting(lake.root).session()
    Counting.opened.clear()
    for number in range(1, 7):
        work = Snapshot(session).partition("a")
        work.replace(REJECTED, rejections("a", str(number)), RUN)
        work.close()
    assert 2 <= len(Counting.opened) <= 3
    assert names(lake) == ["6"]


TEXTS = [f"text {i}" for i in range(6)]


def damage(lake: Lake, how: str) -> None:
    """The embeddings of partition "a", damaged on purpose."""
    vectors, texts = unit(6), list(TEXTS)
    if how == "missing":
        vectors, texts = vectors[:5], texts[:5]
    elif how == "extra":
        vectors, texts = unit(7), [*texts, "no chunk"]
    elif how == "not_finite":
        vectors[3, 1] = np.inf
    elif how == "not_unit_norm":
        vectors[3] *= 1.01
    batch = embeddings("a", vectors, texts)
    if how == "duplicated":
        batch = pa.Table.from_batches([batch, batch.slice(2, 1)]).combine_chunks().to_batches()[0]
    elif how == "stale_text":
        at = batch.schema.get_field_index("text")
        batch = batch.set_column(at, batch.schema.field(at), pa.array(["tampered", *texts[1:]]))
    replace_partition(lake, SPACE, "a", [batch], RUN.rewriting(), dimension=4)


@pytest.mark.parametrize("how", ["missing", "extra", "duplicated", "stale_text", "not_finite", "not_unit_norm"])
def test_verify_finds_each_kind_of_damage(lake: Lake, how: str) -> None:
    write_chunks(lake, "a")
    write_chunks(lake, "b")
    replace_partition(lake, SPACE, "b", [embeddings("b", unit(6))], RUN, dimension=4)
    damage(lake, "nothing")
    assert {key: gaps.total for key, gaps in verify(Snapshot(lake), SPACE, TextAlone())} == {"a": 0, "b": 0}
    damage(lake, how)
    found = dict(verify(Snapshot(lake), SPACE, TextAlone()))
    assert getattr(found["a"], how) == 1
    assert (found["a"].total, found["b"].total) == (1, 0)


def test_verify_finds_wrong_dimensions(lake: Lake) -> None:
    write_chunks(lake, "a")
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(6))], RUN)  # a table without the constraint
    batch = embeddings("a", unit(6))
    short = pa.array(
        [v[:2] if i == 4 else v for i, v in enumerate(batch.column("embedding").to_pylist())],
        EMBEDDINGS.field("embedding").type,
    )
    at = batch.schema.get_field_index("embedding")
    replace_partition(lake, SPACE, "a", [batch.set_column(at, EMBEDDINGS.field(at), short)], RUN.rewriting())
    assert dict(verify(Snapshot(lake), SPACE, TextAlone()))["a"].wrong_dimension == 1


def test_versions_depend_only_on_content(lake: Lake) -> None:
    write_chunks(lake, "a")
    version = Snapshot(lake).content(CHUNK_TABLE, "a")
    assert Snapshot(lake).content(CHUNK_TABLE, "none") != version
    assert [b.num_rows for b in Snapshot(lake).partition("none").rows(CHUNK_TABLE, ["text"])] == []


def chunk_rows(key: str, *texts: str) -> pa.RecordBatch:
    rows = [
        {
            "partition_key": key, "chunk_id": hash_text(text), "document_id": "d", "chunk_index": i, "text": text,
            "heading_path": "", "char_start": 0, "char_end": 1, "token_count": 3, "text_hash": hash_text(text),
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=CHUNK_TABLE.schema)


WIDER = TableSpec("chunks", extra=(pa.field("rank", pa.int32()), pa.field("labels", pa.list_(pa.string()))))
"""As a later version of the code has it."""


def test_an_older_table_gets_new_columns_without_a_rewrite(lake: Lake) -> None:
    replace_partition(lake, CHUNK_TABLE, "a", [chunk_rows("a", "one", "two")], RUN)
    delta = lake.open(CHUNK_TABLE)
    assert delta is not None
    files = delta.file_uris()
    lake.check_tables(WIDER)  # readers accept it as it is
    [batch] = Snapshot(lake).rows(WIDER, ["chunk_id", "rank"])
    assert batch.column("rank").null_count == batch.num_rows == 2
    lake.check_usable(WIDER)
    lake.check_usable(WIDER)
    widened = lake.open(WIDER)
    assert widened is not None and widened.file_uris() == files and widened.version() == delta.version() + 1
    assert columns_of(widened).names == WIDER.schema.names
    [batch] = Snapshot(lake).rows(WIDER, ["chunk_id", "rank", "labels"])
    assert batch.column("rank").to_pylist() == batch.column("labels").to_pylist() == [None, None]
    new = chunk_rows("b", "three")
    new = pa.RecordBatch.from_pylist([new.to_pylist()[0] | {"rank": 7, "labels": ["x"]}], schema=WIDER.schema)
    replace_partition(lake, WIDER, "b", [new], RUN)
    ranks = [row["rank"] for b in Snapshot(lake).rows(WIDER, ["rank"]) for row in b.to_pylist()]
    assert sorted(map(str, ranks)) == ["7", "None", "None"]


def test_foreign_columns_are_left_alone_and_null_in_new_rows(lake: Lake) -> None:
    for key in "ab":
        replace_partition(lake, CHUNK_TABLE, key, [chunk_rows(key, f"one of {key}")], RUN)
    delta = lake.open(CHUNK_TABLE)
    assert delta is not None
    delta.alter.add_columns([Field("label", PrimitiveType("string")), Field("score", PrimitiveType("double"))])
    DeltaTable(lake.uri(CHUNK_TABLE)).update({"label": "'mine'"})
    lake.check_usable(CHUNK_TABLE)
    before = Snapshot(lake).content(CHUNK_TABLE, "b")
    replace_partition(lake, CHUNK_TABLE, "a", [chunk_rows("a", "another")], RUN)
    rows = DeltaTable(lake.uri(CHUNK_TABLE)).to_pyarrow_table().to_pylist()
    assert {(row["partition_key"], row["text"], row["label"], row["score"]) for row in rows} == {
        ("a", "another", None, None),
        ("b", "one of b", "mine", None),
    }
    assert Snapshot(lake).content(CHUNK_TABLE, "b") == before


def test_a_foreign_column_that_is_not_nullable_is_refused(lake: Lake) -> None:
    made = pa.schema([*CHUNKS, pa.field("label", pa.string(), nullable=False)])
    DeltaTable.create(lake.uri(CHUNK_TABLE), made, partition_by=["partition_key"])
    with pytest.raises(LakeError, match="it has gained label, which can't be null"):
        lake.check_usable(SPACE)


def test_columns_are_added_despite_concurrent_writers(lake: Lake) -> None:
    """A schema change conflicts with every commit: both are retried."""
    replace_partition(lake, CHUNK_TABLE, "a", [chunk_rows("a", "one")], RUN)

    class Busy(Lake):
        """A lake that another process writes to right after a table is opened."""

        def open_path(self, path: str, version: int | None = None) -> DeltaTable | None:
            opened = super().open_path(path, version)
            if path == "chunks":
                replace_partition(Lake(self.root), CHUNK_TABLE, "b", [chunk_rows("b", f"{next(counter)}")], RUN)
            return opened

    counter = iter(range(1000))
    Busy(lake.root).check_usable(WIDER)
    widened = lake.open(WIDER)
    assert widened is not None and "page_start" in columns_of(widened).names
    assert Snapshot(lake).content(CHUNK_TABLE, "a") == Snapshot(lake).content(WIDER, "a")

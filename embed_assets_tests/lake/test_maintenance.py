"""Compaction, vacuum, sweeping and the removal of spaces, on untidy tables."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from embed_assets.errors import LakeError
from embed_assets.lake.maintenance import RETENTION, maintain
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, REJECTED, Lake, TableSpec
from embed_assets.lake.writer import Provenance
from embed_assets.records import REJECTED_ROWS, utc_now

ODD = "it's 100% a/b é\n.."
LONG_AGO = time.time() - RETENTION.total_seconds() - 3600


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def rows(key: str, *names: str) -> pa.RecordBatch:
    made = [
        {"partition_key": key, "document_id": n, "uri": "u", "reason": "empty", "detail": "d", "rejected_at": utc_now()}
        for n in names
    ]
    return pa.RecordBatch.from_pylist(made, schema=REJECTED_ROWS)


def replace(lake: Lake, key: str, *names: str) -> None:
    Snapshot(lake).partition(key).replace(REJECTED, [rows(key, *names)], Provenance("run"))


def append(lake: Lake, key: str, *names: str) -> None:
    """Add one more file to the partition, as other tools do."""
    write_deltalake(lake.uri(REJECTED), pa.Table.from_batches([rows(key, *names)]), mode="append")


def names(lake: Lake) -> list[str]:
    return sorted(n for b in Snapshot(lake).rows(REJECTED, ["document_id"]) for n in b.column(0).to_pylist())


def files(lake: Lake) -> int:
    return len(DeltaTable(lake.uri(REJECTED)).file_uris())


def test_small_files_are_merged_but_not_in_a_dry_run(lake: Lake) -> None:
    for key in ("a", ODD):
        replace(lake, key, f"{key}1", f"{key}2")
        append(lake, key, f"{key}3")
    replace(lake, "single", "s")
    before = names(lake)
    [work] = maintain(lake, [], timedelta(), dry_run=True).tables
    assert (work.table, work.partitions_to_compact, work.files_to_compact) == ("rejected_documents", 2, 4)
    assert files(lake) == 5
    maintain(lake, [], timedelta(), dry_run=False)
    assert files(lake) == 3
    assert names(lake) == before
    [work] = maintain(lake, [], timedelta(), dry_run=True).tables
    assert work.partitions_to_compact == 0


def test_compaction_with_concurrent_writers_loses_no_row(lake: Lake) -> None:
    keys = [f"p{i}" for i in range(4)]
    for key in keys:
        replace(lake, key, f"{key}-0")
        append(lake, key, f"{key}-extra")
    is_over = threading.Event()
    problems: list[str] = []

    def write(key: str) -> None:
        for number in range(1, 8):
            replace(lake, key, *(f"{key}-{number}-{i}" for i in range(number)))

    def read() -> None:
        while not is_over.wait(0.01):
            seen = names(lake)
            for key in keys:
                mine = [n for n in seen if n.startswith(f"{key}-")]
                numbers = {n.split("-")[1] for n in mine}
                if len(numbers - {"extra"}) != 1 or len(mine) != max(1, int(min(numbers))) + ("extra" in numbers):
                    problems.append(f"{key}: {mine}")

    threads = [threading.Thread(target=write, args=(key,)) for key in keys]
    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    while any(thread.is_alive() for thread in threads):
        append_to = Lake(lake.root)
        maintain(append_to, [], timedelta(), dry_run=False)
    is_over.set()
    reader.join()
    assert not problems
    assert names(lake) == sorted(f"{key}-7-{i}" for key in keys for i in range(7))


def test_vacuum_removes_only_old_orphans(lake: Lake) -> None:
    replace(lake, "a", "x")
    folder = Path(lake.uri(REJECTED)) / "partition_key=a"
    for name, age in (("old.parquet", LONG_AGO), ("new.parquet", time.time())):
        (folder / name).write_bytes(b"written by a run that was killed")
        os.utime(folder / name, (age, age))
    assert maintain(lake, [], timedelta(), dry_run=True).tables[0].files_to_vacuum == 1
    maintain(lake, [], timedelta(days=30), dry_run=False)
    assert (folder / "old.parquet").exists(), "a run that began thirty days ago may be writing it"
    maintain(lake, [], timedelta(), dry_run=False)
    assert not (folder / "old.parquet").exists() and (folder / "new.parquet").exists()
    assert names(lake) == ["x"]


def test_unfinished_files_of_killed_processes_are_removed(lake: Lake) -> None:
    replace(lake, "a", "x")
    old, new = (Path(lake.root) / "rejected_documents/partition_key=a" / f"part.parquet#{i}" for i in (1, 2))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (LONG_AGO, LONG_AGO))
    assert maintain(lake, [], timedelta(), dry_run=True).abandoned_files == [str(old)]
    assert old.exists()
    maintain(lake, [], timedelta(), dry_run=False)
    assert not old.exists() and new.exists()


def test_a_checkpoint_is_written_after_some_commits(lake: Lake) -> None:
    for number in range(12):
        replace(lake, "a", str(number))
    assert maintain(lake, [], timedelta(), dry_run=True).tables[0].commits_since_checkpoint == 12
    maintain(lake, [], timedelta(), dry_run=False)
    assert list((Path(lake.root) / "rejected_documents/_delta_log").glob("*.checkpoint*.parquet"))
    assert maintain(lake, [], timedelta(), dry_run=True).tables[0].commits_since_checkpoint == 0
    assert names(lake) == ["11"]


def test_spaces_are_listed_and_removed_by_name_only(lake: Lake) -> None:
    for space in ("current", "other", "another"):
        lake.create(TableSpec("embeddings", space), 4)
    found = maintain(lake, ["current"], timedelta(), dry_run=False)
    assert [(s.name, s.is_current, s.bytes > 0) for s in found.spaces] == [
        ("another", False, True),
        ("current", True, True),
        ("other", False, True),
    ]
    assert lake.spaces() == ["another", "current", "other"]
    assert maintain(lake, ["current"], timedelta(), True, ["other"]).removed_spaces == []
    assert maintain(lake, ["current"], timedelta(), False, ["other"]).removed_spaces == ["other"]
    assert lake.spaces() == ["another", "current"]
    for name, rule in (("current", "in use"), ("other", "no space"), ("../chunks", "no space"), ("", "no space")):
        with pytest.raises(LakeError, match=rule):
            maintain(lake, ["current"], timedelta(), False, [name])


def test_a_damaged_table_does_not_keep_the_others_from_being_maintained(lake: Lake) -> None:
    replace(lake, "a", "x")
    append(lake, "a", "y")
    lake.create(CHUNK_TABLE)
    (Path(lake.uri(CHUNK_TABLE)) / "_delta_log/00000000000000000000.json").write_text("{broken")
    done = maintain(lake, [], timedelta(), dry_run=False)
    assert [work.table for work in done.failed] == ["chunks"]
    assert files(lake) == 1

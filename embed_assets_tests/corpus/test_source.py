"""Partitions of a source, their versions and keys, and the ids of their documents."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from dagster._core.definitions.partitions.utils.base import INVALID_PARTITION_SUBSTRINGS
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.corpus.source import ROOT_PARTITION, Source, partition_key
from embed_assets.errors import SourceError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/one.md", "a/deep/two.md", "b/three.md", "loose.md", ".hidden/x.md", "a/.git/config"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path


def ids(source: Source) -> dict[str, list[str]]:
    """Document ids by partition key."""
    return {key: [p.document_id(f) for f in p.files] for key, p in source.partitions().items()}


def test_by_folder(tree: Path) -> None:
    assert ids(Source(str(tree), "folder")) == {
        ROOT_PARTITION: ["loose.md"],
        "a": ["deep/two.md", "one.md"],
        "b": ["three.md"],
    }


def test_by_file(tree: Path) -> None:
    found = ids(Source(str(tree), "file"))
    assert found == {
        "a/one.md": ["one.md"],
        "a/deep/two.md": ["two.md"],
        "b/three.md": ["three.md"],
        "loose.md": ["loose.md"],
    }


def test_by_hash_is_stable_and_loses_no_file(tree: Path) -> None:
    found = ids(Source(str(tree), "hash:4"))
    assert sorted(name for names in found.values() for name in names) == [
        "a/deep/two.md",
        "a/one.md",
        "b/three.md",
        "loose.md",
    ]
    assert found == ids(Source(str(tree), "hash:4"))
    assert all(key.endswith("-of-4") for key in found)


def test_any_fsspec_url(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for name in ("/corpus/a/one.md", "/corpus/loose.md", "/corpus/.hidden/no.md"):
        filesystem.pipe_file(name, name.encode())
    source = Source("memory://corpus", "folder")
    assert ids(source) == {ROOT_PARTITION: ["loose.md"], "a": ["one.md"]}
    file = source.partitions()["a"].files[0]
    with source.open(file) as stream:
        assert stream.read() == b"/corpus/a/one.md"
    assert source.uri(file) == "memory://corpus/a/one.md"
    filesystem.rm("/corpus", recursive=True)


def test_versions_follow_times_and_names(tree: Path) -> None:
    def versions() -> dict[str, str]:
        return {key: p.version for key, p in Source(str(tree), "folder").partitions().items()}

    before = versions()
    assert versions() == before
    os.utime(tree / "b/three.md", (5, 5))
    (tree / "a/one.md").rename(tree / "a/other.md")
    after = versions()
    assert after[ROOT_PARTITION] == before[ROOT_PARTITION]
    assert after["a"] != before["a"]
    assert after["b"] != before["b"]


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="must be an existing folder"):
        Source(str(tmp_path / "none"), "folder").partitions()
    with pytest.raises(SourceError, match="can't be listed"):
        Source("memory://none", "folder").partitions()
    with pytest.raises(SourceError, match="EMBED_SOURCE"):
        Source("nosuchprotocol://x", "folder").partitions()


@given(st.lists(st.text(st.characters(exclude_characters="/"), min_size=1, max_size=300), unique=True, max_size=20))
def test_keys_are_valid_and_unique(names: list[str]) -> None:
    keys = [partition_key(name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert not any(bad in key for bad in INVALID_PARTITION_SUBSTRINGS)
        key.encode("utf-8")


def test_ordinary_names_are_their_own_keys() -> None:
    for name in ("o'x; DROP=1 é %2F", "a b", "2026-01-01", "🙂", ".."):
        assert partition_key(name) == name
    assert partition_key("_root") != "_root"


def test_no_name_collides_with_a_hashed_key() -> None:
    key = partition_key("a...b")
    assert partition_key(key) != key
    for name in ("日" * 80, "a b" * 80, "x" * 250):
        assert len(quote(partition_key(name), safe="")) <= 200
        assert partition_key(name) != partition_key(name + "2")


def test_undecodable_names_and_times_beyond_datetime(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    with contextlib.suppress(OSError, OverflowError):
        os.utime(tmp_path / "a.md", (2**40, 2**40))
    (tmp_path / os.fsdecode(b"\xfe.md")).write_text("b")
    (tmp_path / "\\udcfe.md").write_text("c")
    source = Source(str(tmp_path), "folder")
    assert len(set(ids(source)[ROOT_PARTITION])) == 3
    assert all(source.uri(f).isprintable() for f in source.partitions()[ROOT_PARTITION].files)


def test_a_remote_file_is_not_a_source() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/single/a.md", b"a")
    with pytest.raises(SourceError, match="must be an existing folder"):
        Source("memory://single/a.md", "folder").partitions()
    filesystem.rm("/single", recursive=True)

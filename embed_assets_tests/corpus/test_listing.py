"""Detecting changes by what file systems report: every edit is noticed, or the source is read each time."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.corpus.listing import find, ignored_names
from embed_assets.corpus.source import Source, detects_changes, has_same_files
from embed_assets_tests.conftest import Project

MOMENT = datetime(2025, 11, 27, 8, 32, 5, tzinfo=UTC)


class Listed:
    """A file system that lists one file with the given info, and can report nothing else."""

    def __init__(self, **info: Any) -> None:
        self._info = {"name": "/base/a/one.md", "type": "file", "size": 3, **info}

    def find(self, base: str, detail: bool) -> dict[str, dict[str, Any]]:
        return {"/base/a/one.md": self._info}

    def info(self, name: str) -> dict[str, Any]:
        return self._info

    def modified(self, name: str) -> datetime:
        raise NotImplementedError

    def ukey(self, name: str) -> str:
        return f"hash of the name {name}"


@pytest.mark.parametrize(
    ("info", "version", "modified_at"),
    [
        ({"ETag": '"abc"', "LastModified": MOMENT}, '"abc"', MOMENT),  # S3
        ({"etag": "e", "md5Hash": "m", "updated": "2025-11-27T08:32:05Z"}, "e", MOMENT),  # Google Cloud Storage
        ({"content_md5": "m", "last_modified": MOMENT}, "m", MOMENT),  # Azure
        ({"mtime": MOMENT, "time": datetime.now(UTC)}, MOMENT.isoformat(), MOMENT),  # SFTP, SMB, HDFS
        ({"mtime": MOMENT.timestamp()}, MOMENT.isoformat(), MOMENT),  # archives
        ({"modify": "20251127083205", "unique": "x"}, MOMENT.isoformat(), MOMENT),  # FTP
        ({"modify": "20251127083205.123"}, MOMENT.isoformat(), MOMENT),
        ({"modify": "Nov 27 08:32"}, "Nov 27 08:32", datetime(1970, 1, 1, tzinfo=UTC)),  # FTP without MLSD
        ({"modificationTime": int(MOMENT.timestamp() * 1000), "accessTime": 5}, MOMENT.isoformat(), MOMENT),  # WebHDFS
        (
            {"sha": "2ef7bde608ce5404e97d5f042f95f89f1c232871"},
            "2ef7bde608ce5404e97d5f042f95f89f1c232871",
            None,
        ),  # GitHub
        ({"hex": "e69de29"}, "e69de29", None),  # git
        ({"blob_id": "e69de29", "last_commit": None}, "e69de29", None),  # Hugging Face
        ({"CRC": 3421780262, "date_time": (2025, 11, 27, 8, 32, 5)}, "3421780262", MOMENT),  # ZIP
        ({"Last-Modified": "Thu, 27 Nov 2025 08:32:05 GMT"}, MOMENT.isoformat(), MOMENT),  # HTTP
        ({"content_hash": "h", "server_modified": MOMENT}, "h", MOMENT),  # Dropbox
        ({"checksum": "c"}, "c", None),  # lakeFS
        ({"last_modified": "2025-11-27T08:32:05.000000Z"}, MOMENT.isoformat(), MOMENT),  # Jupyter
    ],
)
def test_keys_of_real_file_systems_are_recognized(
    info: dict[str, Any], version: str, modified_at: datetime | None
) -> None:
    [file] = find(Listed(**info), "/base", ignored_names(""), [])
    assert (file.path, file.version) == ("a/one.md", version)
    assert file.modified_at == (modified_at or datetime(1970, 1, 1, tzinfo=UTC))


def test_a_file_system_without_checksums_and_times() -> None:
    [file] = find(Listed(accessTime=3, permission="644"), "/base", ignored_names(""), [])
    assert file.version == ""


class Unversioned(MemoryFileSystem):
    """A file system that reports neither checksums nor times."""

    protocol = "unversioned"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace(f"{cls.protocol}://", "memory://")))

    def find(self, path: str, *options: Any, detail: bool = False, **others: Any) -> Any:
        found = super().find(path, *options, detail=detail, **others)
        return {name: self.info(name) for name in found} if detail else found

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in super().info(path, **options).items() if name != "created"}

    def modified(self, path: str) -> datetime:
        raise NotImplementedError


class Keyed(Unversioned):
    """Adds a `ukey` that depends on the content."""

    protocol = "keyed"
    store: dict[str, Any] = {}  # noqa: RUF012

    def ukey(self, path: str) -> str:
        return str(hash(self.cat_file(path)))


class Timed(Unversioned):
    """Adds modification times, on request only."""

    protocol = "timed"
    store: dict[str, Any] = {}  # noqa: RUF012

    def modified(self, path: str) -> datetime:
        return MOMENT


fsspec.register_implementation("unversioned", Unversioned, clobber=True)
fsspec.register_implementation("keyed", Keyed, clobber=True)
fsspec.register_implementation("timed", Timed, clobber=True)


@pytest.mark.parametrize(("protocol", "is_conclusive"), [("unversioned", False), ("keyed", True), ("timed", True)])
def test_versions_missing_in_the_listing_are_looked_up(protocol: str, is_conclusive: bool) -> None:
    filesystem = fsspec.filesystem(protocol)
    filesystem.pipe_file("/corpus/a/one.md", b"one")
    source = Source(f"{protocol}://corpus", "folder")
    before = source.partitions()["a"].version
    assert detects_changes(before) is is_conclusive
    filesystem.pipe_file("/corpus/a/one.md", b"two")
    after = source.partitions()["a"].version
    assert (before != after) is (protocol == "keyed")
    assert has_same_files(before, after)


def test_a_source_without_versions_is_read_each_time(project: Project) -> None:
    filesystem = fsspec.filesystem("unversioned")
    filesystem.pipe_file("/vague/a/one.md", b"one")
    project.set(SOURCE="unversioned://vague")
    assert project.sync()["embedded"] == 1
    assert project.sync() | {"seconds": 0} == project.sync() | {"seconds": 0}
    plan = project.json("plan")["partitions"][0]["assets"]
    assert plan["raw_documents"]["state"] == "stale" and "read each time" in plan["raw_documents"]["reasons"][0]
    assert plan["chunks"]["state"] == plan["embeddings"]["state"] == "fresh"
    filesystem.pipe_file("/vague/a/one.md", b"two")
    assert project.sync()["embedded"] == 1
    assert [row["text"] for row in project.rows("text")] == ["two"]


def same_size_edit(project: Project, folder: Path) -> None:
    """Replace a file by one of the same size: the next sync embeds it, and the one after that nothing."""
    (folder / "a").mkdir(parents=True)
    file = folder / "a" / "one.md"
    file.write_text("before")
    os.utime(file, (1_700_000_000,) * 2)
    assert project.sync()["embedded"] == 1
    assert project.sync()["partitions"]["a"]["state"] == "fresh"
    file.write_text("after!")
    assert project.sync()["embedded"] == 1
    assert [row["text"] for row in project.rows("text")] == ["after!"]
    assert project.sync()["partitions"]["a"]["state"] == "fresh"


def test_edits_on_a_real_ftp_server(project: Project, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pyftpdlib.authorizers import DummyAuthorizer\nfrom pyftpdlib.handlers import FTPHandler\n"
        "from pyftpdlib.servers import FTPServer\nauthorizer = DummyAuthorizer()\n"
        "authorizer.add_anonymous(sys.argv[1])\nFTPHandler.authorizer = authorizer\n"
        "server = FTPServer(('127.0.0.1', 0), FTPHandler)\nprint(server.address[1], flush=True)\n"
        "server.serve_forever()\n"
    )
    folder = tmp_path / "served"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        project.set(SOURCE=f"ftp://127.0.0.1:{int(server.stdout.readline())}/")
        same_size_edit(project, folder)
    finally:
        server.kill()
        server.communicate()


@contextmanager
def served(handler: Any) -> Iterator[str]:
    """'host:port' of an HTTP server with this handler."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: Any) -> None: ...


def test_edits_on_a_real_http_server(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    with served(partial(Quiet, directory=str(folder))) as address:
        project.set(SOURCE=f"http://{address}")
        same_size_edit(project, folder)


def test_a_broken_link_on_a_web_page_does_not_hide_the_others(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "one.md").write_text("one")
    (folder / "index.html").write_text('<a href="one.md">one</a> <a href="gone.md">gone</a>')
    with served(partial(Quiet, directory=str(folder))) as address:
        project.set(SOURCE=f"http://{address}")
        assert project.sync()["partitions"]["_root"]["documents"] == 1


class Timeless(Quiet):
    """Sends neither an ETag nor a time."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


def test_edits_on_an_http_server_without_versions(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    (folder / "a").mkdir(parents=True)
    (folder / "a/one.md").write_text("before")
    with served(partial(Timeless, directory=str(folder))) as address:
        project.set(SOURCE=f"http://{address}")
        assert project.sync()["embedded"] == 1
        assert project.sync()["partitions"]["a"]["state"] == "materialized"
        (folder / "a/one.md").write_text("after!")
        assert project.sync()["embedded"] == 1


def test_edits_on_webhdfs(project: Project) -> None:
    """Against the part of the HDFS REST API that listing and reading need."""
    state = {"text": b"before", "time": 1_700_000_000_000}

    class Hdfs(Quiet):
        def do_GET(self) -> None:
            path, operation = urlsplit(self.path).path.removeprefix("/webhdfs/v1"), self.path
            file = {"type": "FILE", "length": len(state["text"]), "modificationTime": state["time"]}  # type: ignore[arg-type]
            folder = {"type": "DIRECTORY", "length": 0, "modificationTime": 1}
            if "op=LISTSTATUS" in operation:
                found = [{**file, "pathSuffix": "one.md"}] if path.endswith("/a") else [{**folder, "pathSuffix": "a"}]
                self.answer({"FileStatuses": {"FileStatus": found}})
            elif "op=GETFILESTATUS" in operation:
                self.answer({"FileStatus": {**(file if path.endswith(".md") else folder), "pathSuffix": ""}})
            else:
                self.send(state["text"])  # type: ignore[arg-type]

        def answer(self, found: Any) -> None:
            self.send(json.dumps(found).encode())

        def send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with served(Hdfs) as address:
        project.set(SOURCE=f"webhdfs://{address}/corpus")
        assert project.sync()["embedded"] == 1
        assert project.sync()["partitions"]["a"]["state"] == "fresh"
        state |= {"text": b"after!", "time": 1_700_000_009_000}
        assert project.sync()["embedded"] == 1


def test_hidden_files_are_reported(project: Project) -> None:
    for name in ("a/one.md", "a/.draft.md", ".git/config", ".git/HEAD", ".DS_Store", "a/..odd.md"):
        project.write(name, "Text.")
    hidden = [".DS_Store", ".git", "a/.draft.md"]
    assert project.json("discover")["hidden"] == hidden
    assert project.sync()["hidden"] == hidden
    for command in ("discover", "sync"):
        told = "left out: 3 files or folders whose names begin with a dot or match EMBED_IGNORE (.DS_Store, .git,"
        assert told in project.run(command).stdout
    assert {row["document_id"] for row in project.rows("document_id")} == {"one.md", "..odd.md"}


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1), min_size=1))
def test_parsing_a_uri_gives_the_path_back(parts: list[str]) -> None:
    from embed_assets.corpus.listing import SourceFile

    path = "/".join(parts)
    file = SourceFile(path, 1, MOMENT, "v")
    assert unquote(urlsplit(Source("/home/me/50% off", "folder").uri(file)).path) == f"/home/me/50% off/{path}"
    parsed = urlsplit(Source("s3://bucket/x", "folder").uri(file))
    assert (parsed.netloc, unquote(parsed.path), parsed.query, parsed.fragment) == ("bucket", f"/x/{path}", "", "")
    parsed = urlsplit(Source("s3://bucket/my docs#1", "folder").uri(file))
    assert (parsed.netloc, unquote(parsed.path)) == ("bucket", f"/my docs#1/{path}")


def test_uris_in_tables_are_percent_encoded(project: Project) -> None:
    project.write("a/50% off #1 what?.md", "Text.")
    project.write("b/naïve.md", "Text.")
    project.sync()
    uris = {urlsplit(row["uri"]) for row in project.rows("uri")}
    paths = {Path(unquote(uri.path)) for uri in uris}
    assert paths == {project.landing / "a/50% off #1 what?.md", project.landing / "b/naïve.md"}
    assert all(uri.scheme == "file" and uri.geturl().isascii() for uri in uris)


def test_the_package_can_be_imported_without_the_resource_module() -> None:
    code = "import sys, psutil; sys.modules['resource'] = None; import embed_assets.cli, embed_assets.definitions"
    code += ", embed_assets.defs.sync, embed_assets.corpus.sandbox"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["a%20b", "x[1]", "a^b", "a|b", "back\\slash"])
def test_lakes_at_paths_that_delta_cannot_handle_are_refused(project: Project, name: str) -> None:
    project.write("a/one.md", "One.")
    project.set(LAKE=str(project.root / name))
    result = project.run("sync")
    assert result.exit_code == 1 and "Delta's library can't keep tables in a place with" in result.stderr
    assert not (project.root / name).exists()


@pytest.mark.parametrize("name", ["sp ace", "ha#sh", "q?m", "ünï", "quo'te", "100%", "a:b"])
def test_lakes_at_paths_with_other_special_characters_work(project: Project, name: str) -> None:
    project.write("a/one.md", "One.")
    project.set(LAKE=str(project.root / name))
    assert project.sync()["embedded"] == 1
    assert project.sync()["partitions"]["a"]["state"] == "fresh" and project.json("verify")["ok"]


def test_urls_with_a_fragment_are_refused(project: Project) -> None:
    project.set(LAKE="s3://bucket/lake#1")
    assert "with '#' in its name" in project.run("plan").stderr

"""The sandbox that parses documents which may take too long or too much memory, and hostile row files."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embed_assets.children import send
from embed_assets.corpus.formats.parsed import Parsed
from embed_assets.corpus.items import BadRow
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.sandbox import ParserProcess
from embed_assets.errors import SourceError
from embed_assets_tests.corpus.test_parsing import read

PAGE = b"<div><b>words and words</b></div>" * 1_000_000


def kill_repeatedly(parser: ParserProcess, is_done: threading.Event, times: int) -> None:
    """Kill the parser's process up to `times` times, until `is_done` is set."""
    while times and not is_done.wait(0.1):
        if parser._process is not None and parser._process.poll() is None:
            parser._process.kill()
            times -= 1


@pytest.mark.parametrize("times", [1, 1000])
def test_a_killed_process_is_restarted_once_per_document(times: int) -> None:
    parser, is_done = ParserProcess(), threading.Event()
    assert parser.parse(".html", b"<title>T</title><p>One.</p>") == Parsed("One.\n", "T")
    killer = threading.Thread(target=kill_repeatedly, args=(parser, is_done, times))
    killer.start()
    if times == 1:
        assert "words and words" in parser.parse(".html", PAGE).text
    else:
        with pytest.raises((BadRow.Error, SourceError)):
            parser.parse(".html", PAGE)
    is_done.set()
    killer.join()
    assert parser.parse(".html", b"<p>Two.</p>").text == "Two.\n"
    parser.close()


def test_an_interrupted_request_leaves_no_answer_for_the_next_one() -> None:
    parser = ParserProcess()
    parser.parse(".html", b"<p>Zero.</p>")
    process = parser._running()
    assert process.stdin is not None
    send(process.stdin, b".html", b"<p>One.</p>")
    with pytest.raises(KeyboardInterrupt):
        parse_interrupted(parser)
    assert parser.parse(".html", b"<p>Two.</p>").text == "Two.\n"
    parser.close()


def parse_interrupted(parser: ParserProcess) -> None:
    """Simulates Ctrl-C while a document is being sent."""

    class Interrupts(bytes):
        def __len__(self) -> int:
            raise KeyboardInterrupt

    parser.parse(".html", Interrupts(b"x"))


def test_a_document_that_exceeds_the_memory_limit_is_rejected(tmp_path: Path) -> None:
    """A PDF page whose stream expands to gigabytes. The file next to it is still read."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>",
        b"<</Length 40000000/Filter/ASCII85Decode>>stream\n" + b"z" * 40_000_000 + b"~>\nendstream",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj" % number + content + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(data)
    data += (
        b"xref\n0 5\n0000000000 65535 f \n" + table + b"trailer<</Root 1 0 R/Size 5>>\nstartxref\n%d\n%%%%EOF" % start
    )
    (tmp_path / "a.pdf").write_bytes(data)
    (tmp_path / "b.html").write_text("<p>Neighbour.</p>")
    started = time.process_time()
    found = read(tmp_path, ParseOptions())
    assert getattr(found["a.pdf"], "reason", "") in ("too_costly", "broken_file", "empty")
    assert getattr(found["b.html"], "text", "") == "Neighbour.\n"
    assert time.process_time() - started < 30, "the parsing must happen in the child process"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "id", "title", "x"]), VALUES, max_size=4), max_size=8))
@settings(max_examples=150, deadline=None)
def test_every_line_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    root = tmp_path_factory.mktemp("lines")
    (root / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read(root)
    assert len(found) == max(1, len(rows)) if rows else len(found) == 1
    for item in found.values():
        if metadata := getattr(item, "metadata", None):
            json.loads(metadata, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
@example(places=[(750146, 110), (862701, 42), (556334, 6)])  # reading its column metadata aborted the process
@settings(max_examples=100, deadline=None)
def test_parquet_with_flipped_bytes_never_raises(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("parquet")
    table = pa.table(
        {"text": [f"text {i}" for i in range(50)], "id": list(range(50)), "more": [[i] * 3 for i in range(50)]}
    )
    pq.write_table(table, root / "a.parquet")
    data = bytearray((root / "a.parquet").read_bytes())
    for place, change in places:
        data[place % len(data)] ^= change
    (root / "a.parquet").write_bytes(data)
    assert read(root)

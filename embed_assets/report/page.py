"""Renders a report as one HTML page that loads nothing: style, script and data are inside it.

Texts of documents are only in the block of JSON, in which no character can end the block, and the page's script writes
them as text. Its Content-Security-Policy allows this style and this script by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from string import Template

from embed_assets.report.attention import attention
from embed_assets.report.data import MAX_POINTS, Absent, NearPair, Report

MAX_BYTES = 10_000_000
"""Size of a page. 5,000 points with snippets of English take 2.5 MB; texts are cut shorter where they would not fit."""
_SNIPPET, _DETAIL, _NAME = 300, 600, 160
"""Characters that are kept of a text, of a sentence about it, and of a name."""
_SCRIPTS = ("elements", "tables", "charts", "map", "atlas", "content", "operations", "page")
"""Files of the page's script, in the order in which they need each other."""
_LENGTHS = {"text": _SNIPPET, **dict.fromkeys(("detail", "advice", "why"), _DETAIL)}
_MOST = {"points": MAX_POINTS, "counts": 10_000, "partitions": 2000, "runs": 200, "examples": 5, "places": 5}
_MOST_OF_OTHERS = 100
"""Items that are kept of a list; the page says how many others there are. With texts at their shortest, all take less
than 5 MB."""
_UNSAFE = "<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffe\uffff"
"""Ranges of characters: what could end the block of data, what editors hide or reorder, what UTF-8 can't have."""
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in re.findall(f"[{_UNSAFE}]", "".join(map(chr, range(0x10000))))}
_STATES = ("active", "building", "ready", "previous", "retired")


def render(report: Report) -> str:
    """The page, to be written as UTF-8; at most `MAX_BYTES`.

    Long texts and lists are cut, and the page says so. Raises ``ValueError`` if the map has more than `MAX_POINTS`.
    """
    if not isinstance(report.map, Absent) and len(report.map.points) > MAX_POINTS:
        raise ValueError(f"a map has at most {MAX_POINTS} points, got {len(report.map.points)}; sample fewer")
    style, script = _asset("page.css"), "".join(_asset(f"{name}.js") for name in _SCRIPTS)
    parts = {"title": _title(report.title), "policy": _policy(style, script), "style": style, "script": script}
    arranged, shortening = _arrange(report), 1
    while True:
        page = Template(_asset("page.html")).substitute(parts, data=_block(arranged, shortening))
        if len(page.encode()) <= MAX_BYTES:
            return page
        shortening *= 2


def _asset(name: str) -> str:
    return files("embed_assets.report").joinpath(name).read_text("utf-8")


def _title(title: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in _cut(title, _NAME)))


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which the page can load nothing, and runs no other script."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_hash, script_hash = (f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; style-src {style_hash}; script-src {script_hash}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _arrange(report: Report) -> Report:
    """The report with its lists in the order in which they are shown, so that the cut takes what matters least."""
    partitions, runs, generations = report.partitions, report.runs, report.generations
    rejections, duplicates = report.rejections, report.duplicates
    if not isinstance(partitions, Absent):
        order = sorted(partitions, key=lambda p: (p.vectors >= p.chunks, -p.chunks, p.partition_key))
        report = replace(report, partitions=tuple(order))
    if not isinstance(runs, Absent):
        report = replace(report, runs=tuple(sorted(runs, key=lambda r: r.started_at, reverse=True)))
    if not isinstance(generations, Absent):
        report = replace(report, generations=tuple(sorted(generations, key=lambda g: _STATES.index(g.state))))
    if not isinstance(rejections, Absent):
        reasons = tuple(sorted(rejections.reasons, key=lambda r: -r.count))
        report = replace(report, rejections=replace(rejections, reasons=reasons))
    if not isinstance(duplicates, Absent):
        most = tuple(sorted(duplicates.partitions, key=lambda p: -(p.repeated + p.near) / max(p.chunks, 1)))
        pairs = tuple(map(_show_difference, duplicates.pairs))
        report = replace(report, duplicates=replace(duplicates, partitions=most, pairs=pairs))
    return report


def _show_difference(pair: NearPair) -> NearPair:
    """The pair with texts that begin shortly before their first difference, so that their snippets have it."""
    letters = zip(pair.first.text, pair.second.text, strict=False)
    same = next((i for i, (a, b) in enumerate(letters) if a != b), min(len(pair.first.text), len(pair.second.text)))
    if same < _SNIPPET // 2:
        return pair
    earliest = same - _SNIPPET // 4
    start = max(pair.first.text.find(" ", earliest, same), earliest)
    first, second = (replace(p, text="…" + p.text[start:]) for p in (pair.first, pair.second))
    return replace(pair, first=first, second=second)


def _block(report: Report, shortening: int) -> str:
    """The data as JSON that is safe inside a script element, with texts cut to a part of their usual length."""
    notices = [_plain(notice, shortening) for notice in attention(report)]
    data = {**_fields(report, shortening), "attention": notices, "totals": _totals(report)}
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def _totals(report: Report) -> Mapping[str, int]:
    """Sums over all partitions, of which the page may show fewer; empty if they were not counted."""
    if isinstance(report.partitions, Absent):
        return {}
    names = ("documents", "chunks", "vectors", "rejected")
    sums = {name: sum(getattr(p, name) for p in report.partitions) for name in names}
    return {"partitions": len(report.partitions), **sums}


def _fields(record: object, shortening: int) -> dict[str, object]:
    """A dataclass as a JSON object. Of a list that is too long, its `NAME_left_out` is the number that was cut off."""
    found: dict[str, object] = {}
    for field in fields(record):  # type: ignore[arg-type]
        name, value = field.name, getattr(record, field.name)
        if isinstance(value, tuple):
            most = _MOST.get(name, _MOST_OF_OTHERS)
            if len(value) > most:
                found[f"{name}_left_out"] = len(value) - most
            found[name] = [_plain(item, shortening) for item in value[:most]]
        elif isinstance(value, str):
            found[name] = _cut(value, _LENGTHS.get(name, _NAME) // shortening)
        else:
            found[name] = _plain(value, shortening)
    return found


def _plain(value: object, shortening: int) -> object:
    """A value as JSON has it; numbers that are not finite become null."""
    if is_dataclass(value):
        return _fields(value, shortening)
    if isinstance(value, str):
        return _cut(value, _NAME // shortening)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds")
    if isinstance(value, float):
        # Seven digits tell any two places on the screen, and norms, apart.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _cut(text: str, length: int) -> str:
    """The first characters of a text, at least eight."""
    return text if len(text) <= max(length, 8) else text[: max(length, 8) - 1] + "…"

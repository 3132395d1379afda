"""Filters of rows, against the same conditions in plain Python."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.errors import SettingsError
from embed_assets.lake.filters import parse_filter
from embed_assets.records import TIMESTAMP

SCHEMA = pa.schema(
    [
        ("partition_key", pa.string()),
        ("document_id", pa.string()),
        ("chunk_index", pa.int32()),
        ("meta_year", pa.int64()),
        ("meta_price", pa.float64()),
        ("meta_tags", pa.list_(pa.string())),
        ("is_truncated", pa.bool_()),
        ("embedded_at", TIMESTAMP),
        ("embedding", pa.list_(pa.float32())),
    ]
)
WORDS = ["a", "b", "ab", "it's", "100%", "x_y", "\\", "or", "é", ""]
Row = dict[str, Any]
Truth = Callable[[Row], bool | None]
"""A condition in Python: None where SQL says null."""


def batch(rows: list[Row]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def found(text: str, rows: list[Row]) -> list[int]:
    """Places of the rows that match."""
    numbered = batch([row | {"chunk_index": i} for i, row in enumerate(rows)])
    kept = parse_filter(text, SCHEMA).among(numbered, ["chunk_index"])
    return list(kept.column("chunk_index").to_pylist())


rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "partition_key": st.sampled_from(WORDS),
            "document_id": st.sampled_from(WORDS) | st.none(),
            "meta_year": st.integers(-3, 3) | st.none(),
            "meta_price": st.sampled_from([-0.5, 0.0, 2.0, 1e300]) | st.none(),
            "meta_tags": st.lists(st.sampled_from(WORDS) | st.none(), max_size=3) | st.none(),
            "is_truncated": st.booleans() | st.none(),
        }
    ),
    max_size=12,
)
OPERATORS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt}


def quote(word: str) -> str:
    return "'" + word.replace("'", "''") + "'"


def compared(name: str, symbol: str, value: Any) -> Truth:
    return lambda row: None if row[name] is None else OPERATORS[symbol](row[name], value)


def like(name: str, pattern: str) -> Truth:
    expression = re.compile("".join({"%": ".*", "_": "."}.get(c, re.escape(c)) for c in pattern), re.DOTALL)
    return lambda row: None if row[name] is None else expression.fullmatch(row[name]) is not None


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, Truth]:
    """A comparison, as text and in Python."""
    kind = draw(st.sampled_from(["text", "number", "bool", "in", "like", "null", "contains", "between"]))
    name = draw(st.sampled_from(["partition_key", "document_id"]))
    word, symbol = draw(st.sampled_from(WORDS)), draw(st.sampled_from(list(OPERATORS)))
    if kind == "text":
        return f"{name} {symbol} {quote(word)}", compared(name, symbol, word)
    if kind == "number":
        column = draw(st.sampled_from(["meta_year", "meta_price"]))
        number = draw(st.sampled_from([-1, 0, 2, 1.5, -0.5]))
        return f"{column.removeprefix('meta_')} {symbol} {number}", compared(column, symbol, number)
    if kind == "bool":
        flag = draw(st.booleans())
        return f"is_truncated = {str(flag).upper()}", compared("is_truncated", "=", flag)
    if kind == "in":
        words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
        negated = draw(st.booleans())
        text = f"{name} {'NOT ' * negated}in ({', '.join(map(quote, words))})"
        return text, lambda row: None if row[name] is None else (row[name] in words) != negated
    if kind == "like":
        pattern = draw(st.sampled_from(["%", "a%", "_", "%'%", "x__", "\\", "100%", "%b"]))
        return f"{name} LIKE {quote(pattern)}", like(name, pattern)
    if kind == "null":
        return f"{name} is not null", lambda row: row[name] is not None
    if kind == "contains":
        return (
            f"tags contains {quote(word)}",
            lambda row: None if row["meta_tags"] is None else word in row["meta_tags"],
        )
    return "year between -1 and 2", lambda row: None if row["meta_year"] is None else -1 <= row["meta_year"] <= 2


def both(one: Truth, other: Truth) -> Truth:
    def decide(row: Row) -> bool | None:
        values = (one(row), other(row))
        return False if False in values else None if None in values else True

    return decide


def negated(one: Truth) -> Truth:
    return lambda row: None if (value := one(row)) is None else not value


def either(one: Truth, other: Truth) -> Truth:
    return negated(both(negated(one), negated(other)))


def combined(parts: st.SearchStrategy[tuple[str, Truth]]) -> st.SearchStrategy[tuple[str, Truth]]:
    pairs = st.tuples(parts, parts)
    return (
        pairs.map(lambda p: (f"({p[0][0]}) and ({p[1][0]})", both(p[0][1], p[1][1])))
        | pairs.map(lambda p: (f"({p[0][0]} OR {p[1][0]})", either(p[0][1], p[1][1])))
        | parts.map(lambda p: (f"not ({p[0]})", negated(p[1])))
    )


@settings(deadline=None, max_examples=300)
@given(st.recursive(conditions(), combined, max_leaves=6), rows_strategy)
def test_a_filter_finds_what_plain_python_finds(condition: tuple[str, Truth], rows: list[Row]) -> None:
    text, truth = condition
    expected = [i for i, row in enumerate(rows) if truth(row) is True]
    assert found(text, rows) == expected
    only = dict(parse_filter(text, SCHEMA).only)
    assert all(rows[i][column] in values for column, values in only.items() for i in expected)


def test_and_binds_closer_than_or() -> None:
    rows = [{"partition_key": key, "meta_year": year} for key, year in (("a", 1), ("a", 2), ("b", 1))]
    assert found("partition_key = 'b' or partition_key = 'a' and year = 2", rows) == [1, 2]
    assert found("not partition_key = 'b' and year = 1", rows) == [0]


def test_a_list_can_be_cut_from_a_longer_one() -> None:
    rows = [{"meta_tags": tags} for tags in (["a"], [], None, ["b", "a"], ["b"])]
    whole = batch(rows)
    kept = parse_filter("tags contains 'a'", SCHEMA).among(whole.slice(1, 3), ["meta_tags"])
    assert kept.column("meta_tags").to_pylist() == [["b", "a"]]


def test_times_are_utc_unless_they_say_otherwise() -> None:
    times = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    rows = [{"embedded_at": time} for time in times]
    assert found("embedded_at >= '2026-01-02'", rows) == [1, 2]
    assert found("embedded_at > '2026-01-02T01:00:00+02:00'", rows) == [1, 2]


@pytest.mark.parametrize(
    "text, where",
    [
        ("partition_key = 'it''s'", "partition_key IN ('it''s')"),
        ("partition_key in ('b', 'a') and year = 1", "partition_key IN ('a', 'b')"),
        ("partition_key = 'a' and document_id = 'd'", "partition_key IN ('a') AND document_id IN ('d')"),
        ("partition_key = 'a' or document_id = 'd'", None),
        ("partition_key = 'a' or partition_key = 'b'", "partition_key IN ('a', 'b')"),
        ("not partition_key = 'a'", None),
        ("partition_key = 'a' and partition_key = 'b'", "false"),
        ("year = 1", None),
    ],
)
def test_files_are_skipped_by_what_all_matching_rows_have(text: str, where: str | None) -> None:
    assert parse_filter(text, SCHEMA).where == where


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "which is wrong at 'its end'"),
        ("year >", "wrong at"),
        ("year = 1; drop table chunks", "wrong at '; drop table chunks'"),
        ('partition_key = "a"', "text is in single quotes"),
        ("partition_key = 'a", "wrong at"),
        ("1 = 1", "wrong at '1 = 1'"),
        ("nope = 1", "must name columns, got 'nope'; there are partition_key,"),
        ("embedding is null", "must name columns, got 'embedding'"),
        ("year = '2020'", "meta_year is int64, which can't be compared with '2020'"),
        ("partition_key = 3", "put text in single quotes"),
        ("is_truncated = 1", "is bool, which"),
        ("tags = 'a'", "meta_tags is a list; use meta_tags contains"),
        ("partition_key contains 'a'", "looks into lists"),
        ("year like '2%'", "like compares text"),
        ("embedded_at > 'yesterday'", "is a time, got 'yesterday'"),
        ("(" * 5000 + "year = 1" + ")" * 5000, "nested levels"),
        ("not " * 5000 + "year = 1", "nested levels"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        parse_filter(text, SCHEMA)


def test_numbers_beyond_a_column_s_range_match_nothing() -> None:
    rows = [{"meta_year": 5}]
    assert found("year < 100000000000000000000000", rows) == [0]
    assert found("year = 1.5", rows) == []

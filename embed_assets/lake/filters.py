"""Filters of rows: a small grammar like SQL's, compared with Arrow's kernels. No text of the user becomes SQL.

year >= 2020 and partition_key in ('a', 'b') and not uri like 's3://old/%'
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lark import Lark, Token, Transformer, UnexpectedInput, v_args
from lark.exceptions import VisitError

from embed_assets.errors import SettingsError
from embed_assets.lake.tables import MOST_VALUES, is_one_of
from embed_assets.lake.vectors import vector_array
from embed_assets.metadata import PREFIX
from embed_assets.records import VECTOR

_GRAMMAR = r"""
    ?start: either
    ?either: both (_OR both)*
    ?both: negation (_AND negation)*
    ?negation: _NOT negation -> without
        | "(" either ")"
        | NAME COMPARISON value -> comparison
        | NAME _IN "(" value ("," value)* ")" -> member
        | NAME _NOT _IN "(" value ("," value)* ")" -> no_member
        | NAME _LIKE STRING -> like
        | NAME _NOT _LIKE STRING -> unlike
        | NAME _BETWEEN value _AND value -> between
        | NAME _CONTAINS value -> contains
        | NAME _IS _NULL -> is_null
        | NAME _IS _NOT _NULL -> is_not_null
    ?value: STRING -> string | NUMBER -> number | TRUE -> true | FALSE -> false
    COMPARISON: "<=" | ">=" | "<>" | "!=" | "==" | "=" | "<" | ">"
    STRING: /'(?:[^']|'')*'/
    NUMBER: /[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?/
    _OR.2: /or(?!\w)/i
    _AND.2: /and(?!\w)/i
    _NOT.2: /not(?!\w)/i
    _IN.2: /in(?!\w)/i
    _LIKE.2: /like(?!\w)/i
    _BETWEEN.2: /between(?!\w)/i
    _CONTAINS.2: /contains(?!\w)/i
    _IS.2: /is(?!\w)/i
    _NULL.2: /null(?!\w)/i
    TRUE.2: /true(?!\w)/i
    FALSE.2: /false(?!\w)/i
    NAME: /[A-Za-z_]\w*/
    %ignore /\s+/
"""
_PARSER = Lark(_GRAMMAR, parser="lalr")
_COMPARISONS: dict[str, Callable[[Any, Any], pa.Array]] = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
ACL = "acl"
"""The field of metadata that says which groups may see a document."""
_MOST_DEPTH = 200
"""Levels of negations and parentheses: more would exhaust Python's stack."""
Value: TypeAlias = str | int | float | bool
Mask: TypeAlias = Callable[[pa.RecordBatch], pa.BooleanArray]
"""Whether each row matches; null where a null makes that unknown, as in SQL."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on rows."""

    columns: frozenset[str]
    """The columns that it needs."""
    mask: Mask
    only: tuple[tuple[str, frozenset[str]], ...] = ()
    """By string column, the values that all matching rows have one of, as far as that can be told."""

    def among(self, batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
        """The rows of a batch that match, with `columns`. Those for which it is unknown do not match."""
        mask = pc.fill_null(self.mask(batch), False)
        found = batch.select(list(columns))
        if mask.true_count == len(mask):
            return found
        kept = [_kept_vectors(c, mask) if c.type == VECTOR else c.filter(mask) for c in found.columns]
        return pa.RecordBatch.from_arrays(kept, schema=found.schema)

    @property
    def where(self) -> str | None:
        """SQL predicate that all matching rows meet, by which files without any are skipped; None: there is none."""
        parts = [
            is_one_of(column, sorted(values)) if values else "false"
            for column, values in self.only
            if column in _PRUNING and len(values) <= MOST_VALUES
        ]
        return " AND ".join(parts) or None

    def __invert__(self) -> Filter:
        return Filter(self.columns, lambda batch: pc.invert(self.mask(batch)))


_PRUNING = ("partition_key", "document_id", "chunk_id")
"""Columns by whose values files, or parts of them, are skipped."""


def parse_filter(text: str, schema: pa.Schema) -> Filter:
    """The filter that a text describes, for rows with the columns of `schema`.

    Raises ``SettingsError`` if it has another grammar, names no column, or compares a column with another type.
    """
    depths = accumulate((c == "(") - (c == ")") for c in text)
    if max(max(depths, default=0), len(re.findall(r"\bnot\b", text, re.I))) > _MOST_DEPTH:
        raise SettingsError(f"a filter must have at most {_MOST_DEPTH} nested levels; simplify it")
    try:
        found = _Compiler(schema).transform(_PARSER.parse(text))
    except UnexpectedInput as error:
        place = max(0, getattr(error, "pos_in_stream", 0) or 0)
        near = text[place : place + 20] or "its end"
        raise SettingsError(
            f"a filter must be like \"year >= 2020 and partition_key = 'a'\", got {text!r}, which is wrong at "
            f"{near!r}: text is in single quotes; there are =, !=, <, <=, >, >=, in (...), like, between, contains, "
            "is null, and, or, not"
        ) from error
    except VisitError as error:
        if isinstance(error.orig_exc, SettingsError):
            raise error.orig_exc from error
        raise
    assert isinstance(found, Filter)
    return found


def _known(column: pa.Array, mask: pa.BooleanArray) -> pa.BooleanArray:
    """The mask with null where the column is null."""
    return pc.if_else(pc.is_valid(column), mask, pa.scalar(None, pa.bool_()))


def filter_of(where: str, groups: Iterable[str] | None, schema: pa.Schema) -> Filter | None:
    """The filter for rows that meet a condition and that one of the groups may see; None if there is neither.

    Raises ``SettingsError`` as `parse_filter` and `visible_to`.
    """
    parts = [parse_filter(where, schema) if where else None, visible_to(groups, schema) if groups is not None else None]
    return all_of(*parts) if any(parts) else None


def visible_to(groups: Iterable[str], schema: pa.Schema) -> Filter:
    """The filter for rows whose document lets one of the groups see it; without a list of groups, none does.

    Raises ``SettingsError`` if documents have no such lists.
    """
    column = f"{PREFIX}{ACL}"
    if column not in schema.names or schema.field(column).type != pa.list_(pa.field("element", pa.string())):
        raise SettingsError(
            f"to search as a group, documents need a field {ACL!r} with the groups that may see them: add "
            f"{ACL}:list<string> to EMBED_METADATA"
        )
    wanted = pa.array(sorted(set(groups)), pa.string())
    return Filter(frozenset([column]), lambda batch: pc.fill_null(_has_one(batch.column(column), wanted), False))


def _kept_vectors(column: pa.ListArray, mask: pa.BooleanArray) -> pa.ListArray:
    """The vectors of the rows of a mask: as `filter`, which takes five times as long."""
    flat, rows = column.flatten().to_numpy(zero_copy_only=False), len(column)
    if column.null_count or len(flat) % rows or pc.count_distinct(pc.list_value_length(column)).as_py() > 1:
        return column.filter(mask)
    return vector_array(flat.reshape(rows, -1)[mask.to_numpy(zero_copy_only=False)])


def all_of(*parts: Filter | None) -> Filter:
    """The filter for rows that all of these filters keep, of which at least one is no None."""
    filters = [part for part in parts if part is not None]
    only = dict[str, frozenset[str]]()
    for column, values in (pair for part in filters for pair in part.only):
        only[column] = only[column] & values if column in only else values
    return _combined(filters, pc.and_kleene, tuple(only.items()))


def one_of(column: str, values: Iterable[str]) -> Filter:
    """The filter for rows that have one of the values in a string column."""
    wanted = frozenset(values)
    array = pa.array(sorted(wanted), pa.string())
    mask = partial(pc.is_in, value_set=array)
    return Filter(frozenset([column]), lambda batch: mask(batch.column(column)), ((column, wanted),))


@v_args(inline=True)
class _Compiler(Transformer[Token, Any]):
    """Makes filters of the parsed text."""

    def __init__(self, schema: pa.Schema) -> None:
        super().__init__()
        self._schema = schema

    def string(self, token: Token) -> str:
        return str(token)[1:-1].replace("''", "'")

    def number(self, token: Token) -> int | float:
        text = str(token)
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)

    def true(self, token: Token) -> bool:
        return True

    def false(self, token: Token) -> bool:
        return False

    def both(self, *parts: Filter) -> Filter:
        return all_of(*parts)

    def either(self, *parts: Filter) -> Filter:
        shared = set.intersection(*(set(dict(part.only)) for part in parts))
        only = {column: frozenset().union(*(dict(part.only)[column] for part in parts)) for column in sorted(shared)}
        return _combined(parts, pc.or_kleene, tuple(only.items()))

    def without(self, part: Filter) -> Filter:
        return ~part

    def comparison(self, name: Token, symbol: Token, value: Value) -> Filter:
        column, scalar = self._column(name), self._scalar(name, value)
        compare = _COMPARISONS[str(symbol)]
        is_equal = (
            compare is pc.equal and isinstance(value, str) and pa.types.is_string(self._schema.field(column).type)
        )
        only = ((column, frozenset([str(value)])),) if is_equal else ()
        return Filter(frozenset([column]), lambda batch: compare(batch.column(column), scalar), only)

    def member(self, name: Token, *values: Value) -> Filter:
        column = self._column(name)
        if pa.types.is_string(self._schema.field(column).type):
            found = one_of(column, [self._scalar(name, value).as_py() for value in values])
            return Filter(found.columns, lambda batch: _known(batch.column(column), found.mask(batch)), found.only)
        return self.either(*(self.comparison(name, Token("COMPARISON", "="), value) for value in values))

    def no_member(self, name: Token, *values: Value) -> Filter:
        return self.without(self.member(name, *values))

    def between(self, name: Token, low: Value, high: Value) -> Filter:
        at_least, at_most = (Token("COMPARISON", symbol) for symbol in (">=", "<="))
        return self.both(self.comparison(name, at_least, low), self.comparison(name, at_most, high))

    def like(self, name: Token, pattern: Token) -> Filter:
        column, text = self._column(name), self.string(pattern)
        if not pa.types.is_string(self._schema.field(column).type):
            raise SettingsError(f"like compares text, but {column} is {self._schema.field(column).type}; use =")
        # A backslash is an ordinary character, not an escape.
        escaped = text.replace("\\", "\\\\")
        return Filter(frozenset([column]), lambda batch: pc.match_like(batch.column(column), escaped))

    def unlike(self, name: Token, pattern: Token) -> Filter:
        return self.without(self.like(name, pattern))

    def is_null(self, name: Token) -> Filter:
        column = self._column(name, allows_lists=True)
        return Filter(frozenset([column]), lambda batch: pc.is_null(batch.column(column)))

    def is_not_null(self, name: Token) -> Filter:
        return self.without(self.is_null(name))

    def contains(self, name: Token, value: Value) -> Filter:
        column = self._column(name, allows_lists=True)
        kind = self._schema.field(column).type
        if not pa.types.is_list(kind):
            raise SettingsError(f"contains looks into lists, but {column} is {kind}; use = or like")
        wanted = pa.array([self._scalar(column, value).as_py()], kind.value_type)
        return Filter(frozenset([column]), lambda batch: _has_one(batch.column(column), wanted))

    def _column(self, name: str, allows_lists: bool = False) -> str:
        known = [f.name for f in self._schema if f.name != "embedding"]
        column = next((n for n in (str(name), f"{PREFIX}{name}") if n in known), None)
        if column is None:
            raise SettingsError(f"a filter must name columns, got {str(name)!r}; there are {', '.join(known)}")
        kind = self._schema.field(column).type
        if pa.types.is_list(kind) and not allows_lists:
            raise SettingsError(f"{column} is a list; use {column} contains 'value'")
        return column

    def _scalar(self, name: str, value: Value) -> pa.Scalar:
        """The value as one of the column's type, or of its elements'."""
        column = self._column(name, allows_lists=True)
        kind = self._schema.field(column).type
        kind = kind.value_type if pa.types.is_list(kind) else kind
        if pa.types.is_integer(kind) and isinstance(value, float):
            return pa.scalar(value, pa.float64())
        if not _is_comparable(kind, value):
            raise SettingsError(f"{column} is {kind}, which can't be compared with {value!r}{_advice(kind)}")
        if pa.types.is_timestamp(kind):
            return pa.scalar(_time(column, str(value)), kind)
        try:
            return pa.scalar(value, pa.float64() if pa.types.is_floating(kind) else kind)
        except (pa.ArrowInvalid, OverflowError):  # beyond the type's range: compared as it is
            return pa.scalar(float(value), pa.float64())


def _combined(
    parts: Sequence[Filter],
    combine: Callable[[pa.Array, pa.Array], pa.Array],
    only: tuple[tuple[str, frozenset[str]], ...],
) -> Filter:
    columns = frozenset().union(*(part.columns for part in parts))
    return Filter(columns, lambda batch: reduce(combine, (part.mask(batch) for part in parts)), only)


def _is_comparable(kind: pa.DataType, value: Value) -> bool:
    if pa.types.is_boolean(kind):
        return isinstance(value, bool)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str)


def _advice(kind: pa.DataType) -> str:
    if pa.types.is_string(kind):
        return "; put text in single quotes"
    if pa.types.is_timestamp(kind):
        return "; write a time as '2026-01-31' or '2026-01-31T12:00:00Z'"
    return ""


def _time(column: str, text: str) -> datetime.datetime:
    """A time in UTC unless it says otherwise."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(f"{column} is a time, got {text!r}; write it as '2026-01-31T12:00:00Z'") from error
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def _has_one(lists: pa.ListArray, wanted: pa.Array) -> pa.BooleanArray:
    """Whether each list has one of the values; null for a null."""
    found = pc.fill_null(pc.is_in(lists.flatten(), value_set=wanted), False).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    counts = np.concatenate([[0], np.cumsum(found)])
    ends = np.cumsum(lengths)
    return pa.array(counts[ends] > counts[ends - lengths], mask=pc.is_null(lists).to_numpy(zero_copy_only=False))

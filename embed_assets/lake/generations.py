"""The active embedding space: one row of a small Delta table that keeps every change of it.

Readers use the active space. Each change rewrites the table in one commit, so that there is one current row at any
moment, and of two changes made at the same time one fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.tables import Lake, lake_errors
from embed_assets.records import TIMESTAMP, utc_now

PATH = "generations"
Action = Literal["first", "promoted", "rolled_back", "retired"]
_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), False),
        pa.field("is_current", pa.bool_(), False),
        pa.field("action", pa.string(), False),
        pa.field("space", pa.string(), False),
        pa.field("active", pa.string(), False),
        pa.field("previous", pa.string()),
        pa.field("changed_at", TIMESTAMP, False),
        pa.field("changed_by", pa.string(), False),
        pa.field("reason", pa.string(), False),
        pa.field("gates", pa.string(), False),
    ]
)


@dataclass(frozen=True, slots=True)
class GateResult:
    """What a gate found about a space."""

    name: str
    passed: bool
    value: float | None
    """The figure that was measured; None if there was nothing to measure."""
    limit: float | None
    """What the figure is held against."""
    detail: str = ""
    """What was found and, if it failed, what to look at: one line."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the spaces' states."""

    action: Action
    space: str
    """The space that was promoted, rolled back to, or retired."""
    active: str
    """The active space from then on."""
    previous: str | None
    """The space that a rollback would make active; None if there is none."""
    changed_by: str
    """Who made the change: a user and host, or a run."""
    reason: str = ""
    """Why, in the words of whoever made it."""
    gates: tuple[GateResult, ...] = ()
    """What the gates found before it."""
    changed_at: datetime | None = None
    """When, UTC; None before it is recorded."""


@dataclass(frozen=True, slots=True)
class Generations:
    """Every change so far, oldest first, as of a version of the table."""

    changes: tuple[Change, ...] = ()
    version: int | None = None
    """None if nothing was recorded yet."""

    @property
    def active(self) -> str | None:
        """The active space; None if none was recorded yet."""
        return self.changes[-1].active if self.changes else None

    @property
    def previous(self) -> str | None:
        """The space that a rollback would make active."""
        return self.changes[-1].previous if self.changes else None

    @property
    def retired(self) -> dict[str, datetime]:
        """When each space was retired that was not promoted since."""
        latest = {change.space: change for change in self.changes}
        return {space: c.changed_at for space, c in latest.items() if c.action == "retired" and c.changed_at}

    def gates_of(self, space: str) -> tuple[GateResult, ...]:
        """What the gates found when the space was promoted last; empty if it never was."""
        return next((c.gates for c in reversed(self.changes) if c.space == space and c.gates), ())


def read_generations(lake: Lake) -> Generations:
    """The recorded changes. Raises ``LakeError`` if the table can't be read."""
    delta = lake.open_path(PATH)
    if delta is None:
        return Generations()
    with lake_errors(f"the table {PATH!r} can't be read", lake.root):
        rows = pa.RecordBatchReader.from_stream(delta.scan(_SCHEMA.names)).read_all().to_pylist()
        return Generations(tuple(map(_change, sorted(rows, key=lambda row: row["number"]))), int(delta.version()))


def record_change(lake: Lake, seen: Generations, change: Change) -> Generations:
    """Add a change to those in `seen`, in one commit. Returns all of them.

    Raises ``SupersededError`` if another process recorded a change since `seen` was read, or ``LakeError``.
    """
    lake.require_writable()
    changes = (*seen.changes, replace(change, changed_at=utc_now()))
    uri, options = f"{lake.root}/{PATH}", lake.options or None
    # A commit that is not the next version fails, in place of being tried again as a later one.
    once = CommitProperties(max_commit_retries=0)
    try:
        with lake_errors("the active space can't be recorded", lake.root):
            if seen.version is None:
                rows = _rows(changes)
                write_deltalake(uri, rows, mode="error", name=PATH, storage_options=options, commit_properties=once)
            else:
                delta = DeltaTable(uri, seen.version, options)
                write_deltalake(delta, _rows(changes), mode="overwrite", commit_properties=once)
    except LakeError as error:
        if read_generations(lake).version == seen.version:
            raise
        raise SupersededError(
            f"the active space must not change while it is being changed, another process did so in {lake.root!r}; "
            "look at 'embed-assets spaces' and run the command again"
        ) from error
    return Generations(changes, 0 if seen.version is None else seen.version + 1)


def _rows(changes: Sequence[Change]) -> pa.Table:
    rows = [
        asdict(change)
        | {
            "number": number,
            "is_current": number == len(changes),
            "gates": json.dumps([asdict(gate) for gate in change.gates], ensure_ascii=False),
        }
        for number, change in enumerate(changes, 1)
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _change(row: Mapping[str, Any]) -> Change:
    gates = tuple(GateResult(**gate) for gate in json.loads(row["gates"]))
    names = ("action", "space", "active", "previous", "changed_by", "reason", "changed_at")
    return Change(gates=gates, **{name: row[name] for name in names})

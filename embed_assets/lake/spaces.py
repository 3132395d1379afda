"""The embedding spaces of a lake, and which one readers use. Importing this module loads neither models nor Dagster."""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.generations import Change, GateResult, Generations, read_generations, record_change
from embed_assets.lake.maintenance import remove_space
from embed_assets.lake.reader import table_state
from embed_assets.lake.tables import Lake, TableSpec


@dataclass(frozen=True, slots=True)
class Spaces:
    """The spaces of a lake, as the settings and the recorded changes see them."""

    configured: str
    """The space of the settings: what runs embed into."""
    tables: tuple[str, ...]
    """Names of the spaces that have a table, sorted."""
    generations: Generations
    active: str | None
    """The space that readers use; None if there is none yet."""

    @property
    def previous(self) -> str | None:
        """The space that a rollback would make active, if its table is still there."""
        previous = self.generations.previous
        return previous if previous in self.tables else None

    @property
    def live(self) -> tuple[str, ...]:
        """Spaces that take arriving documents in besides the configured one: the active and the previous one."""
        found = (space for space in (self.active, self.previous) if space is not None and space != self.configured)
        return tuple(space for space in dict.fromkeys(found) if space in self.tables)

    @property
    def in_use(self) -> tuple[str, ...]:
        """Spaces that must not be removed: the configured one, and those that are live."""
        return (self.configured, *self.live)


@dataclass(frozen=True, slots=True)
class Promotion:
    """The result of a promotion or a rollback."""

    active: str | None
    previous: str | None
    gates: Sequence[GateResult] = ()

    @property
    def failed(self) -> list[GateResult]:
        """The gates that did not pass; if there are any, nothing was changed."""
        return [gate for gate in self.gates if not gate.passed]


@dataclass(frozen=True, slots=True)
class Signature:
    """Who changes the active space, and why."""

    changed_by: str
    reason: str = ""


def find_spaces(lake: Lake, configured: str) -> Spaces:
    """The lake's spaces. `configured` is that of the settings. Raises ``LakeError``.

    The active space is the one recorded. A lake of which none was recorded yet has one nevertheless: the configured
    one, or if that has no table, the one that was written to last.
    """
    generations, tables = read_generations(lake), tuple(lake.spaces())
    active = generations.active
    if active is None and tables:
        active = configured if configured in tables else _written_last(lake, tables)
    return Spaces(configured, tables, generations, active)


def recorded_spaces(lake: Lake) -> Spaces:
    """The lake's spaces by the recorded changes alone, without the settings' model. Raises ``LakeError``."""
    generations = read_generations(lake)
    return Spaces("", tuple(lake.spaces()), generations, generations.active)


def protect_active(lake: Lake, configured: str, changed_by: str) -> None:
    """Before a run embeds into a space that is new: record the one that readers use, if none was recorded yet."""
    spaces = find_spaces(lake, configured)
    if spaces.active not in (None, configured):
        _record_first(lake, spaces, spaces.active, changed_by)


def activate_first(lake: Lake, configured: str, changed_by: str) -> None:
    """After a run without failures: make its space the active one, if none was recorded yet."""
    spaces = find_spaces(lake, configured)
    if configured in spaces.tables:
        _record_first(lake, spaces, configured, changed_by)


def _record_first(lake: Lake, spaces: Spaces, space: str | None, changed_by: str) -> None:
    if spaces.generations.active is None and space is not None:
        first = Change("first", space, space, None, changed_by, "the first space of this lake")
        with contextlib.suppress(SupersededError):  # another run did so at the same time
            record_change(lake, spaces.generations, first)


def space_table(space: str) -> TableSpec:
    """The embeddings table of a space, by its name alone."""
    return TableSpec("embeddings", space)


def rollback(lake: Lake, spaces: Spaces, signed: Signature) -> Promotion:
    """Make the previous space the active one again, and the active one the previous. Embeds nothing.

    Raises ``LakeError`` if there is none.
    """
    active, previous = spaces.active, spaces.previous
    if active is None or previous is None:
        raise LakeError(
            f"a rollback needs a space that was active before and still has its table, the lake {lake.root!r} has "
            "none; 'embed-assets spaces' lists its spaces"
        )
    change = Change("rolled_back", previous, previous, active, signed.changed_by, signed.reason)
    record_change(lake, spaces.generations, change)
    return Promotion(previous, active)


def retire(lake: Lake, spaces: Spaces, space: str, signed: Signature) -> None:
    """Remove a space, by name: arriving documents no longer go into it, and its table is deleted.

    Raises ``LakeError`` if it has no table, is the active one, or is the one that the next run would embed into.
    """
    lake.require_writable()
    require_table(lake, spaces, space)
    if space == spaces.active:
        raise LakeError(f"the active space can't be retired, {space!r} is it; promote another one first")
    if space == spaces.configured:
        raise LakeError(
            f"the space of the settings can't be retired, {space!r} is it: the next run would embed all of it again; "
            "set EMBED_MODEL, EMBED_PROMPT and so on to those of another space first"
        )
    assert spaces.active is not None  # a lake with a table has an active space
    previous = None if space == spaces.previous else spaces.previous
    # Recorded first: whoever is killed in between can run the command again.
    change = Change("retired", space, spaces.active, previous, signed.changed_by, signed.reason)
    record_change(lake, spaces.generations, change)
    remove_space(lake, space)


def this_user() -> str:
    """Who runs this process, as `user@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def require_table(lake: Lake, spaces: Spaces, space: str) -> None:
    """Raise ``LakeError`` if a space has no table."""
    if space not in spaces.tables:
        known = ", ".join(spaces.tables) or "none"
        raise LakeError(
            f"there is no space {space!r} in the lake {lake.root!r}, only {known}; run 'embed-assets sync' first"
        )


def _written_last(lake: Lake, spaces: tuple[str, ...]) -> str | None:
    """The space with the newest rows; None if none has any."""
    written: dict[str, float] = {}
    for space in spaces:
        table = space_table(space)
        if (delta := lake.open(table)) is not None:
            partitions = table_state(lake.root, table, delta).partitions
            written |= {space: max(files.written_at for files in partitions.values())} if partitions else {}
    return max(written, key=lambda space: written[space]) if written else None

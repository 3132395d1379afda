"""The record of the active space: one current row at any moment, whoever changes it."""

from __future__ import annotations

import threading
from pathlib import Path

import polars as pl
import pytest

from embed_assets.errors import LakeError, SettingsError, SupersededError
from embed_assets.lake.generations import Change, GateResult, Generations, read_generations, record_change
from embed_assets.lake.spaces import Signature, recorded_spaces, rollback
from embed_assets.lake.tables import Lake

GATE = GateResult("coverage", True, 100.0, 100.0, "all | of \"it\" — 'quoted'")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path))


def promoted(space: str, previous: str | None) -> Change:
    return Change("promoted", space, space, previous, "somebody@here", "a better model", (GATE,))


def test_a_lake_without_changes_has_no_active_space(lake: Lake) -> None:
    assert read_generations(lake) == Generations()
    assert Generations().active is Generations().previous is None


def test_changes_are_read_as_they_were_recorded(lake: Lake) -> None:
    first = record_change(lake, Generations(), Change("first", "a", "a", None, "run 1"))
    second = record_change(lake, first, promoted("b", "a"))
    assert read_generations(lake) == second
    assert (second.active, second.previous, second.gates_of("b")) == ("b", "a", (GATE,))
    assert second.gates_of("a") == ()


def test_other_readers_find_one_current_row(lake: Lake) -> None:
    seen = Generations()
    for space in ("a", "b", "c"):
        seen = record_change(lake, seen, promoted(space, seen.active))
    rows = pl.read_delta(f"{lake.root}/generations").sort("number")
    assert rows.filter(pl.col("is_current"))["active"].to_list() == ["c"]
    assert rows["space"].to_list() == ["a", "b", "c"]


def test_of_two_changes_at_a_time_one_is_refused(lake: Lake) -> None:
    seen = record_change(lake, Generations(), promoted("a", None))
    record_change(lake, seen, promoted("b", "a"))
    with pytest.raises(SupersededError, match="run the command again"):
        record_change(lake, seen, promoted("c", "a"))
    with pytest.raises(SupersededError):
        record_change(lake, Generations(), promoted("c", None))
    assert read_generations(lake).active == "b"


def test_of_many_threads_one_wins_each_time(lake: Lake) -> None:
    for turn in range(5):
        barrier, won = threading.Barrier(4), list[str]()

        def change(name: str, seen: Generations, barrier: threading.Barrier = barrier, won: list[str] = won) -> None:
            barrier.wait()
            try:
                record_change(lake, seen, promoted(name, seen.active))
            except SupersededError:
                return
            won.append(name)

        seen = read_generations(lake)
        threads = [threading.Thread(target=change, args=(f"{turn}-{i}", seen)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [read_generations(lake).active]
    assert len(read_generations(lake).changes) == 5


def test_a_lake_that_must_not_change_does_not(lake: Lake) -> None:
    with pytest.raises(SettingsError, match="EMBED_READ_ONLY"):
        record_change(Lake(lake.root, is_read_only=True), Generations(), promoted("a", None))


def test_a_rollback_needs_a_space_to_go_back_to(lake: Lake) -> None:
    with pytest.raises(LakeError, match="a rollback needs a space that was active before"):
        rollback(lake, recorded_spaces(lake), Signature("me"))
    record_change(lake, Generations(), promoted("b", "a"))  # a has no table
    with pytest.raises(LakeError, match="a rollback needs"):
        rollback(lake, recorded_spaces(lake), Signature("me"))


def test_what_was_retired_and_promoted_again_is_not_retired(lake: Lake) -> None:
    seen = record_change(lake, Generations(), promoted("a", None))
    seen = record_change(lake, seen, Change("retired", "x", "a", None, "me"))
    assert set(seen.retired) == {"x"}
    assert set(record_change(lake, seen, promoted("x", "a")).retired) == set()

"""How a sync groups partitions into runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embed_assets.defs.instance import open_instance
from embed_assets.defs.ranges import run_ranges
from embed_assets_tests.conftest import Project

KEYS = [f"p{i:03}" for i in range(600)]


@given(st.lists(st.sampled_from("dfo"), max_size=200))
def test_ranges_cover_what_is_due_and_pass_over_nothing_but_fresh_ones(kinds: list[str]) -> None:
    registered = KEYS[: len(kinds)]
    of_kind = {kind: {key for key, k in zip(registered, kinds, strict=True) if k == kind} for kind in "dfo"}
    ranges = list(run_ranges(registered, of_kind["d"], of_kind["f"]))
    assert [key for _, _, keys in ranges for key in keys] == [key for key in registered if key in of_kind["d"]]
    for first, last, keys in ranges:
        assert (first, last) == (keys[0], keys[-1])
        within = registered[registered.index(first) : registered.index(last) + 1]
        assert of_kind["o"].isdisjoint(within)


def test_scattered_partitions_need_few_runs() -> None:
    def runs(due: list[str]) -> int:
        return len(list(run_ranges(KEYS, due, set(KEYS).difference(due))))

    assert runs(KEYS[::2]) == runs(KEYS) == runs(KEYS[:1]) == 1
    assert runs([KEYS[0], KEYS[250], KEYS[550]]) == 2
    assert runs([]) == 0


def test_fresh_partitions_in_a_range_are_left_alone(project: Project) -> None:
    for i in range(8):
        project.write(f"p{i}/a.txt", f"text {i}")
    project.sync()
    with open_instance() as instance:
        before = instance.get_runs_count()
    for i in range(0, 8, 2):
        project.write(f"p{i}/a.txt", f"new text {i}")
    answer = project.sync()
    states = [answer["partitions"][f"p{i}"]["state"] for i in range(8)]
    assert states == ["materialized", "fresh"] * 4
    assert answer["embedded"] == 4
    with open_instance() as instance:
        assert instance.get_runs_count() == before + 1
    assert project.sync()["embedded"] == 0
    plan = project.json("plan")
    assert {a["state"] for p in plan["partitions"] for a in p["assets"].values()} == {"fresh"}

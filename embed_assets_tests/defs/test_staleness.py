"""Our staleness rule against Dagster's own, on random histories, and how events are read."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator

import dagster as dg
import pytest

from embed_assets.defs.dagster_internals import check_version, latest_event_ids, read_events
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS
from embed_assets.errors import SettingsError
from embed_assets_tests.conftest import Project
from embed_assets_tests.defs.dagster_runs import dagster_says, run, run_range, we_say

KEYS = ("a", "b", "c")


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance() as opened:
        yield opened


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))])
def test_our_states_match_dagsters_on_random_histories(
    project: Project, instance: dg.DagsterInstance, seed: int
) -> None:
    chance = random.Random(seed)
    texts = ["One.", "Two.", "Two, but longer.", "# Three\n\nOne."]
    for key in KEYS:
        project.write(f"{key}/one.md", "One.")
    project.json("discover")

    def edit() -> None:
        project.write(f"{chance.choice(KEYS)}/{chance.choice(['one', 'two'])}.md", chance.choice(texts))

    def touch() -> None:
        files = sorted(project.landing.glob("*/*.md"))
        if files:
            os.utime(chance.choice(files), (chance.randrange(10**9),) * 2)

    def remove() -> None:
        shutil.rmtree(project.landing / chance.choice(KEYS), ignore_errors=True)

    def change_code() -> None:
        project.set(CHUNK_TOKENS=chance.choice(["100", "120"]))

    def change_model() -> None:
        project.set(MODEL=chance.choice(["fake:16", "fake:16@other"]))

    def make_some() -> None:
        run(instance, chance.choice(KEYS), *chance.sample(ASSETS, chance.randrange(1, 3)))

    def make_one() -> None:
        run(instance, chance.choice(KEYS))

    def make_range() -> None:
        run_range(instance, *sorted(chance.sample(KEYS, 2)))

    def sync() -> None:
        project.sync()

    def report() -> None:
        """What "Report materialization" in the UI does: an event without versions."""
        event = dg.AssetMaterialization(chance.choice(ASSETS), partition=chance.choice(KEYS))
        instance.report_runless_asset_event(event)

    steps = [edit, edit, touch, remove, change_code, change_model, make_some, make_some, make_one, make_range, sync]
    for _ in range(14):
        step = chance.choice([*steps, report])
        step()
        project.json("discover")
        assert we_say(instance, *KEYS) == dagster_says(instance, *KEYS), step.__name__


def test_events_are_read_as_dagster_reads_them(instance: dg.DagsterInstance) -> None:
    metadata = {"n": 3, "x": 0.5, "s": "text", "md": dg.MetadataValue.md("*y*"), "flag": True, "none": None}
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            "chunks", partition="p'ü", tags={"t": "1", "dagster/code_version": "c"}, metadata=metadata
        )
    )
    instance.report_runless_asset_event(
        dg.AssetObservation("chunks", partition="q", tags={"dagster/data_version": "v"})
    )
    instance.report_runless_asset_event(dg.AssetMaterialization("chunks", partition="q"))
    for observations in (False, True):
        ids = latest_event_ids(instance, dg.AssetKey("chunks"), None, observations)
        fetch = instance.fetch_observations if observations else instance.fetch_materializations
        theirs = {r.storage_id: r for r in fetch(dg.AssetKey("chunks"), limit=10).records}
        ours = list(read_events(instance, sorted(ids.values())))
        assert {e.storage_id for e in ours} == set(theirs) and len(ours) == (1 if observations else 2)
        for event in ours:
            record = theirs[event.storage_id]
            assert record.asset_event is not None
            assert (event.partition, event.run_id) == (record.asset_event.partition, record.run_id)
            assert dict(event.tags) == dict(record.asset_event.tags or {})
            kinds = dg.IntMetadataValue, dg.FloatMetadataValue
            values = record.asset_event.metadata
            assert event.numbers == {n: v.value for n, v in values.items() if isinstance(v, kinds)}
            assert event.texts == {n: v.value for n, v in values.items() if isinstance(v, dg.TextMetadataValue)}


def test_events_are_read_only_once(project: Project, instance: dg.DagsterInstance) -> None:
    from embed_assets.defs.staleness import load_history

    for key in KEYS:
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    first = load_history(instance, project.pipeline())
    run(instance, "b")
    project.write("b/one.md", "Another.")
    project.sync()
    again, anew = load_history(instance, project.pipeline(), earlier=first), load_history(instance, project.pipeline())
    assert again.records == anew.records
    assert again.records["chunks"]["a"] is first.records["chunks"]["a"]
    assert again.records["chunks"]["b"] is not first.records["chunks"]["b"]


@pytest.mark.parametrize("version", ["1.12.9", "1.13.5", "1.14.0", "2.0.0"])
def test_an_untested_dagster_is_refused_with_the_version_to_install(version: str) -> None:
    with pytest.raises(SettingsError, match=rf"needs Dagster 1\.13\.x.*got {version}; pip install"):
        check_version(version)
    check_version("1.13.6")
    check_version("1.13.99")

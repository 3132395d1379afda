"""Discovery says how far it is."""

from __future__ import annotations

from embed_assets.defs.discovery import discover, list_partitions
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import Names
from embed_assets.defs.staleness import load_history
from embed_assets_tests.conftest import Project


def test_each_new_partition_is_reported(project: Project) -> None:
    for key in "abc":
        project.write(f"{key}/1.txt", "text")
    pipeline, heard = project.pipeline(), list[tuple[str, float]]()
    with open_instance() as instance:
        partitions = list_partitions(instance, pipeline.corpus.source, Names.of(pipeline))
        for expected in (3, 0):
            heard.clear()
            history = load_history(instance, pipeline)
            discover(instance, partitions, history, lambda line, share: heard.append((line, share)))
            assert len(heard) == expected
            if heard:
                assert heard[-1] == ("3 of 3 new or changed partitions recorded", 1.0)

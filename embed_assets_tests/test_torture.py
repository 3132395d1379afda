"""The short versions of `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest

from embed_assets_tests.crowd import crowd
from embed_assets_tests.torture import torture

pytestmark = pytest.mark.long


def test_killed_syncs_lose_at_most_a_window_and_leave_no_damage(tmp_path: Path) -> None:
    report = torture(tmp_path, kills=2, partitions=2, rows=200, texts_per_second=100, seed=3)
    assert not report.problems
    assert report.embedded_again <= report.kills * report.largest_window
    assert report.polls > 20


@pytest.mark.parametrize("on_s3", [False, True], ids=["local", "S3"])
def test_concurrent_processes_lose_nothing(tmp_path: Path, on_s3: bool) -> None:
    assert crowd(tmp_path, processes=3, partitions=3, on_s3=on_s3) == []

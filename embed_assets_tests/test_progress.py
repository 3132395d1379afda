"""What a sync shows on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from embed_assets.progress import ConsoleSink
from embed_assets.stages.outcome import PartitionOutcome


def test_a_partition_that_a_retry_finishes_again_counts_once() -> None:
    shown = io.StringIO()
    with ConsoleSink(Console(file=shown, force_terminal=True, width=120)) as sink:
        sink.finished(PartitionOutcome("a", error="the cluster was lost"), 0.5)
        for share in (0.5, 1.0):
            sink.finished(PartitionOutcome("a", embedded=0), share)
    assert "1 partitions done, 0 texts embedded" in shown.getvalue()
    assert "2 partitions done" not in shown.getvalue()

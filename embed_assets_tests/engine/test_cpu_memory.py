from __future__ import annotations

import ctypes
import subprocess
import sys
from itertools import count

import psutil
import pytest

from embed_assets.engine.backends.cpu_memory import Trimmer

_MANY_SHAPES = """
import psutil, torch
from embed_assets.engine.backends.cpu_memory import bound_operator_caches
from embed_assets.engine.backends.onednn import use_onednn_linears

bound_operator_caches()
model = torch.nn.Sequential(torch.nn.Linear(384, 1536), torch.nn.Linear(1536, 384))
with torch.inference_mode():
    use_onednn_linears(model)
    model(torch.zeros(1024, 384))
    before = psutil.Process().memory_info().rss
    for rows in range(200, 600):
        model(torch.zeros(rows, 384))
    print((psutil.Process().memory_info().rss - before) >> 20)
"""


def test_batches_of_many_shapes_take_no_more_memory_each() -> None:
    # 940 MB without the bound.
    done = subprocess.run([sys.executable, "-c", _MANY_SHAPES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_that_was_freed_is_returned_every_few_seconds() -> None:
    times = count(step=6)
    trimmer = Trimmer(lambda: float(next(times)))
    blocks = [bytes(20_000) for _ in range(10_000)]
    kept = blocks[::500]  # all over the heap, so that what is between them stays when it is freed
    blocks.clear()
    full = psutil.Process().memory_info().rss
    trimmer.after_batch()
    assert psutil.Process().memory_info().rss > full - (50 << 20), "six seconds are too few"
    trimmer.after_batch()
    assert psutil.Process().memory_info().rss < full - (150 << 20)
    assert kept

"""All benchmarks: ``make bench``, or ``make bench DIR=folder`` to use the Markdown documents of a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from embed_assets_tests.benchmarks import (
    bench_chunking,
    bench_embedding,
    bench_feed,
    bench_memory,
    bench_quality,
    bench_ray,
)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    # Runs first, while this process is small: a child's peak memory includes what its parent held when it was started.
    bench_memory.run()
    bench_feed.run(folder)
    bench_chunking.run(folder)
    bench_quality.run(folder)
    bench_embedding.run(folder)
    bench_ray.run(folder)


if __name__ == "__main__":
    main()

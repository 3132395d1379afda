"""Peak memory and speed of a whole `sync` of one large partition, with a fake model of 384 dimensions."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


def run(small: int = 250_000, large: int = 1_000_000, dimension: int = 384) -> None:
    """Print cold, unchanged-but-touched and edited runs of a partition, and a cold one of a larger partition."""
    peaks: dict[int, int] = {}
    for chunks in (small, large):
        print(f"\n== memory: one partition of {chunks:,} chunks, fake model, {dimension} dimensions ==")
        with tempfile.TemporaryDirectory() as name:
            peaks[chunks] = _run_one(Path(name), chunks, dimension, chunks == small)
    print(f"{large:,} chunks take {peaks[large] / peaks[small]:.2f} times the memory of {small:,}")


def _run_one(root: Path, chunks: int, dimension: int, with_edits: bool) -> int:
    """Peak bytes of the cold run."""
    shutil.copy(REPOSITORY / "dagster.yaml", root)
    (root / "landing/big").mkdir(parents=True)
    file = root / "landing/big/rows.jsonl"
    write_rows(file, chunks)
    peaks: list[int] = []
    for label in ("cold", "touched", "one row edited") if with_edits else ("cold",):
        if label == "touched":
            os.utime(file, (1, 1))
        elif label == "one row edited":
            file.write_text(file.read_text().replace('{"id": 7, "text": "', '{"id": 7, "text": "Edited. ', 1))
        started = time.perf_counter()
        answer, peak = sync(root, dimension)
        seconds = time.perf_counter() - started
        print(f"{label:16} {seconds:6.1f} s, peak {peak / 1e6:6.0f} MB, embedded {answer['embedded']:,}", flush=True)
        peaks.append(peak)
    return peaks[0]


def write_rows(file: Path, rows: int) -> None:
    """JSONL whose every row is one chunk of about 600 characters."""
    rng = random.Random(1)
    words = [f"word{i}" for i in range(5000)]
    with file.open("w") as stream:
        for i in range(rows):
            stream.write(json.dumps({"id": i, "text": f"{i} " + " ".join(rng.choices(words, k=70))}) + "\n")


def sync(root: Path, dimension: int) -> tuple[dict[str, int], int]:
    """(the JSON answer, peak bytes of the process)."""
    environment = os.environ | {"EMBED_MODEL": f"fake:{dimension}"}
    command = [sys.executable, "-m", "embed_assets.cli", "sync", "--json"]
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    return answer, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    run()
    print(f"(this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB)")

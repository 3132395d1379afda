"""Many concurrent processes on one lake, local and on S3: part of `make torture`.

Each process syncs its own partitions and one that all share, starting without a lake, while another
process maintains it and a reader polls it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import Lake, TableSpec
from embed_assets_tests.s3 import BUCKET, environment, running_server
from embed_assets_tests.torture import new_project

_DOCUMENTS = 3
_MODEL = "fake:32"


def crowd(root: Path, processes: int, partitions: int, on_s3: bool) -> list[str]:
    """Problems found, one line each."""
    with ExitStack() as stack:
        settings = {"EMBED_MODEL": _MODEL, "EMBED_LAKE": str(root / "lake"), "EMBED_SOURCE": str(root / "landing")}
        lake = Lake(settings["EMBED_LAKE"])
        if on_s3:
            access = environment(stack.enter_context(running_server()))
            settings |= access | {"EMBED_LAKE": f"s3://{BUCKET}/lake"}
            lake = Lake(settings["EMBED_LAKE"], access)
        keys = [["shared", *(f"p{number}-{i}" for i in range(partitions))] for number in range(processes)]
        for key in {key for mine in keys for key in mine}:
            _write(root / "landing" / key)
        projects = [new_project(root / f"project-{number}") for number in range(processes)]
        problems: list[str] = []
        is_over = threading.Event()
        watchers = [
            threading.Thread(target=_read, args=(lake, is_over, problems)),
            threading.Thread(target=_maintain, args=(projects[0], settings, is_over, problems)),
        ]
        started = [
            _start(project, settings, "sync", *(word for key in mine for word in ("--partition", key)))
            for project, mine in zip(projects, keys, strict=True)
        ]
        for watcher in watchers:
            watcher.start()
        for number, process in enumerate(started):
            out, errors = process.communicate()
            if process.returncode or "Traceback" in errors:
                problems.append(f"process {number} ended with {process.returncode}: {out[-500:]}{errors[-500:]}")
        is_over.set()
        for watcher in watchers:
            watcher.join()
        out, errors = _start(projects[0], settings, "verify").communicate()
        found = json.loads(out)
        expected = processes * partitions + 1
        if not found.get("ok") or found["checked"] != expected:
            problems.append(f"verify, of {expected} partitions: {out[-1500:]}{errors[-500:]}")
        counts = _counts(lake)
        problems += [f"{key} has {n} rows" for key, n in counts.items() if n != _DOCUMENTS]
        return problems


def _write(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i in range(_DOCUMENTS):
        (folder / f"{i}.md").write_text(f"Text {i} of {folder.name}.")


def _start(project: Path, settings: dict[str, str], *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "embed_assets.cli", *command, "--json"],
        cwd=project,
        env=os.environ | settings | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _counts(lake: Lake) -> Counter[str]:
    """Rows per partition of the space's table, as any Delta reader sees them."""
    return Counter(
        key
        for space in lake.spaces()
        for batch in Snapshot(lake).rows(TableSpec("embeddings", space), ["partition_key"])
        for key in batch.column(0).to_pylist()
    )


def _read(lake: Lake, is_over: threading.Event, problems: list[str]) -> None:
    while not is_over.wait(0.2):
        problems += [f"a reader saw {n} rows of {key}" for key, n in _counts(lake).items() if n != _DOCUMENTS]


def _maintain(project: Path, settings: dict[str, str], is_over: threading.Event, problems: list[str]) -> None:
    while not is_over.wait(2):
        process = _start(project, settings, "maintain")
        out, errors = process.communicate()
        if process.returncode:
            problems.append(f"maintain ended with {process.returncode}: {(errors or out)[-1500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--partitions", type=int, default=20)
    options = parser.parse_args()
    failed = False
    for on_s3 in (False, True):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            problems = crowd(Path(folder), options.processes, options.partitions, on_s3)
        where = "S3" if on_s3 else "local"
        seconds = time.monotonic() - started
        size = f"{options.processes} processes x {options.partitions} partitions"
        print(f"{size}, {where}: {seconds:.0f} s; problems: {' '.join(problems) or 'none'}", flush=True)
        failed = failed or bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()

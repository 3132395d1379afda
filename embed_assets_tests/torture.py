"""Kill syncs at random moments and check for damage: `make torture`.

Every round changes the corpus, starts a sync, kills it with SIGKILL, and runs it again to the end, while a reader
polls the tables. Finally the tables must equal those of an undisturbed lake.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

REPOSITORY = Path(__file__).parent.parent
_MODEL = "fake:32"
_EMBEDDED = re.compile(r"debug: (\d+) texts embedded")
_WINDOW = re.compile(r"debug: a window of (\d+) texts")


@dataclass(slots=True)
class Report:
    """The results."""

    kills: int = 0
    distinct_texts: int = 0
    """Texts that had to be embedded."""
    embedded_texts: int = 0
    """Texts that the model was given, by all processes."""
    largest_window: int = 0
    polls: int = 0
    """How often the reader looked."""
    problems: list[str] = field(default_factory=list)

    @property
    def embedded_again(self) -> int:
        """Texts embedded again because of kills."""
        return self.embedded_texts - self.distinct_texts

    def __str__(self) -> str:
        lost = f"{self.embedded_again:,} of {self.distinct_texts:,} texts embedded again"
        allowed = f"{self.kills} windows of up to {self.largest_window:,} texts are allowed"
        return f"{self.kills} kills: {lost} ({allowed}); {self.polls:,} polls; problems: {self.problems or 'none'}"


class Corpus:
    """Documents that change every round, and every state in which a reader may see a partition."""

    def __init__(self, folder: Path, partitions: int, rows: int, seed: int) -> None:
        self._folder, self._rows, self._random = folder, rows, random.Random(seed)
        self._keys = [f"part-{i}" for i in range(partitions)]
        self._texts: dict[str, list[str]] = {}
        self.allowed: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
        self.all_texts: set[str] = set()

    def change(self, number: int) -> None:
        """Write new texts for most partitions: all of their texts at first, later some."""
        for key in self._keys:
            texts = self._texts.get(key, [])
            kept = [text for text in texts if self._random.random() < 0.5]
            new = [f"Round {number}, text {i} of {key}." for i in range(self._rows - len(kept))]
            self._texts[key] = [*kept, *new]
            file = self._folder / key / "rows.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = (json.dumps({"id": text, "text": text}) for text in self._texts[key])
            file.write_text("\n".join(rows))
            self.allowed[key].append(frozenset(self._texts[key]))
            self.all_texts.update(self._texts[key])


class Reader(threading.Thread):
    """Polls a table and records every partition that is neither in its old nor in its new state."""

    def __init__(self, lake: Path, corpus: Corpus, report: Report) -> None:
        super().__init__(daemon=True)
        self._lake, self._corpus, self._report = lake, corpus, report
        self._is_over = threading.Event()

    def stop(self) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        while not self._is_over.wait(0.05):
            for table in [self._lake / "chunks", *(self._lake / "embeddings").glob("*")]:
                self._look(table)
            self._report.polls += 1

    def _look(self, table: Path) -> None:
        try:
            rows = pa.table(DeltaTable(str(table)).scan(["partition_key", "text"]))
        except TableNotFoundError:
            return
        seen: defaultdict[str, list[str]] = defaultdict(list)
        for key, text in zip(*(rows[name].to_pylist() for name in ("partition_key", "text")), strict=True):
            seen[key].append(text)
        for key, texts in seen.items():
            if len(texts) != len(set(texts)) or frozenset(texts) not in self._corpus.allowed[key]:
                self._report.problems.append(
                    f"{table.name}: a reader saw {len(texts)} rows of {key} that are no version"
                )


def torture(root: Path, kills: int, partitions: int, rows: int, texts_per_second: int, seed: int = 0) -> Report:
    """Kill that many syncs in the empty folder `root`; prints a line for each."""
    report, chance = Report(), random.Random(seed)
    project = new_project(root / "killed")
    corpus = Corpus(project / "landing", partitions, rows, seed)
    reader = Reader(project / "lake", corpus, report)
    reader.start()
    model = f"{_MODEL}~{texts_per_second}"
    corpus.change(0)
    _, seconds = _sync(project, model, report)
    for number in range(1, kills + 1):
        corpus.change(number)
        after = chance.uniform(seconds / 10, seconds)
        killed = _killed_sync(project, model, after, report)
        again, lasted = _sync(project, model, report)
        # How long a sync takes that starts in the same state as the killed one.
        seconds = max(lasted + killed / texts_per_second, lasted)
        print(f"kill {number}: after {after:.1f} s and {killed} texts; {again} in the rerun", flush=True)
    reader.stop()
    report.distinct_texts = len(corpus.all_texts)
    quiet = new_project(root / "quiet")
    shutil.copytree(project / "landing", quiet / "landing", dirs_exist_ok=True)
    _sync(quiet, _MODEL, Report())
    _compare(project, quiet, report)
    if report.embedded_again > report.kills * report.largest_window:
        report.problems.append(f"{report.embedded_again} texts were embedded again")
    return report


def new_project(folder: Path) -> Path:
    """A folder with the project's dagster.yaml and an empty landing zone."""
    (folder / "landing").mkdir(parents=True)
    shutil.copy(REPOSITORY / "dagster.yaml", folder)
    return folder


def _start(project: Path, model: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "embed_assets.cli", "sync", "--json", "--debug"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("EMBED_", "DAGSTER_"))}
    with (project / "out.log").open("wb") as out, (project / "errors.log").open("wb") as errors:
        return subprocess.Popen(
            command,
            cwd=project,
            env=environment | {"EMBED_MODEL": model, "PYTHONPATH": str(REPOSITORY)},
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )


def _embedded(project: Path, report: Report) -> int:
    log = (project / "errors.log").read_text("utf-8", "replace")
    report.largest_window = max([report.largest_window, *map(int, _WINDOW.findall(log))])
    counts = [int(n) for n in _EMBEDDED.findall(log)]
    report.embedded_texts += sum(counts)
    return sum(counts)


def _killed_sync(project: Path, model: str, after: float, report: Report) -> int:
    """Start a sync and kill it; the number of texts embedded until then."""
    process = _start(project, model)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    report.kills += 1
    return _embedded(project, report)


def _sync(project: Path, model: str, report: Report) -> tuple[int, float]:
    """Run a sync; (texts embedded, seconds)."""
    started = time.monotonic()
    process = _start(project, model)
    if process.wait(600) != 0:
        errors = (project / "errors.log").read_text("utf-8", "replace")
        report.problems.append(f"a rerun ended with {process.returncode}: {errors[-2000:]}")
    return _embedded(project, report), time.monotonic() - started


def _compare(project: Path, quiet: Path, report: Report) -> None:
    """Report every table that differs between the projects, apart from times and paths."""
    for table in ("raw_documents", "chunks", *(f"embeddings/{p.name}" for p in (quiet / "lake/embeddings").iterdir())):
        ours, theirs = (_rows(folder / "lake" / table) for folder in (project, quiet))
        if ours != theirs:
            report.problems.append(f"{table} differs: {len(ours)} rows instead of {len(theirs)}")
    if left := [str(p) for p in (project / "lake/embeddings").rglob("_staging/*") if p.is_file()]:
        report.problems.append(f"staged windows are left: {left}")


def _rows(table: Path) -> list[str]:
    rows = pa.table(DeltaTable(str(table)).scan()).to_pylist()
    kept = ({k: v for k, v in row.items() if k not in ("embedded_at", "modified_at", "uri")} for row in rows)
    return sorted(repr(sorted(row.items())) for row in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--rows", type=int, default=400, help="texts per partition")
    parser.add_argument("--speed", type=int, default=250, help="texts per second of the fake model")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        report = torture(Path(folder), options.kills, options.partitions, options.rows, options.speed, options.seed)
    print(report)
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()

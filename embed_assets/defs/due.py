"""What is due of a partition in a run, and where the rows of its commits come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.names import ASSETS, DEPENDENCIES
from embed_assets.defs.staleness import History, Status
from embed_assets.errors import PartitionError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import TableSpec
from embed_assets.lake.writer import Provenance
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Due:
    """Decides what a run has to do, from what was recorded before it."""

    pipeline: Pipeline
    history: History
    """What was recorded before this run."""
    selected: Sequence[str]
    """Names of the assets to materialize."""
    run_id: str

    def is_due(self, asset: str, outcome: PartitionOutcome) -> bool:
        """Whether the asset is selected, and missing or stale; adds the reasons to `outcome`.

        Raises ``PartitionError`` if it is due and one of its inputs was never materialized.
        """
        if asset not in self.selected:
            return False
        status = self.status(asset, outcome)
        if status.state == "fresh":
            return False
        outcome.reasons[asset] = status.reasons
        for dependency in DEPENDENCIES[asset]:
            if outcome.versions[dependency] is None:
                raise PartitionError(
                    f"{asset} of partition {outcome.key!r} needs {dependency}, which was never materialized; "
                    "select it as well"
                )
        return True

    def partitions(self, partitions: Iterable[SourcePartition]) -> dict[str, list[SourcePartition]]:
        """The partitions of which a selected asset is missing or stale, by asset."""
        due: dict[str, list[SourcePartition]] = {asset: [] for asset in ASSETS}
        for files in partitions:
            outcome = self.history.outcome(files.key, files.version)
            for asset in self.selected:
                if self.status(asset, outcome).state != "fresh":
                    due[asset].append(files)
        return due

    def status(self, asset: str, outcome: PartitionOutcome) -> Status:
        """The status of an asset's partition whose inputs have the versions in `outcome`."""
        inputs = {dependency: outcome.versions[dependency] for dependency in DEPENDENCIES[asset]}
        return self.history.status(asset, outcome.key, self.pipeline.code_versions[asset], inputs)

    def is_as_recorded(self, table: TableSpec, partition: PartitionSnapshot) -> bool:
        """Whether the partition's rows are those recorded, so that changed documents alone can be replaced."""
        return self.history.is_as_recorded(table, partition, self.pipeline.code_versions[table.kind])

    def provenance(self, asset: str, outcome: PartitionOutcome) -> Provenance:
        """Where the rows come from that the run writes now."""
        rewrite = self.history.is_marked_for_repair(asset, outcome.key)
        previous = self.history.version(asset, outcome.key) or ""
        return Provenance(self.run_id, input_versions(asset, outcome), rewrite, previous)


def input_versions(asset: str, outcome: PartitionOutcome) -> dict[str, str]:
    """Data versions of the asset's dependencies, by name."""
    return {dependency: outcome.versions[dependency] or "" for dependency in DEPENDENCIES[asset]}

"""Asset checks: evaluates the checks of `stages/checks.py` per partition, plus a freshness check."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import dagster as dg

from embed_assets.defs.dagster_internals import Evaluation
from embed_assets.defs.names import Names
from embed_assets.defs.staleness import READ_EACH_TIME, Status
from embed_assets.errors import PartitionError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.stages.checks import CHECKS, Outcome, Subject, evaluate
from embed_assets.stages.pipeline import Pipeline

FRESHNESS = "freshness"
_FRESHNESS_DESCRIPTION = "Source, code and inputs are still those that the three assets were materialized from."
_BLOCKING = {(check.asset, check.name) for check in CHECKS if check.is_blocking}


def check_specs(names: Names) -> list[dg.AssetCheckSpec]:
    """Specs of all checks, each partitioned like its asset."""
    checks = [(c.asset, c.name, c.description) for c in CHECKS]
    return [
        dg.AssetCheckSpec(
            name,
            asset=names.key(asset),
            description=description,
            blocking=(asset, name) in _BLOCKING,
            partitions_def=names.partitions,
        )
        for asset, name, description in [*checks, ("embeddings", FRESHNESS, _FRESHNESS_DESCRIPTION)]
    ]


@dataclass(frozen=True, slots=True)
class Checker:
    """Evaluates the checks that a run selected and records the evaluations that changed."""

    pipeline: Pipeline
    names: Names
    record: Callable[[dg.AssetCheckEvaluation], None]
    """Callback that records one evaluation."""
    selected: Collection[dg.AssetCheckKey]
    known: Mapping[tuple[dg.AssetCheckKey, str], Evaluation]
    """The latest evaluation by check and partition; an identical one is not recorded again."""

    def check(
        self,
        asset: str,
        partition: PartitionSnapshot,
        stale: Mapping[str, Status],
        found: Mapping[str, Outcome] | None = None,
    ) -> None:
        """Evaluate the selected checks of an asset on a partition; `stale` has the status of assets that are not fresh.

        `found` has the outcomes if they were evaluated elsewhere. Raises ``PartitionError`` if a blocking check fails.
        """
        for name, outcome in self.outcomes(asset, partition, stale, found).items():
            if not outcome.passed and (asset, name) in _BLOCKING:
                raise PartitionError(f"the check {name!r} of {asset} failed: {outcome.detail}")

    def outcomes(
        self,
        asset: str,
        partition: PartitionSnapshot,
        stale: Mapping[str, Status],
        found: Mapping[str, Outcome] | None = None,
    ) -> dict[str, Outcome]:
        """Evaluate the selected checks of an asset, and record changed results: outcomes by check name."""
        target = self.pipeline.target
        subject = Subject(partition, target.table, target.model_input, self.pipeline.settings)
        outcomes = dict(evaluate(asset, self.names_of(asset), subject) if found is None else found)
        if asset == "embeddings" and self._is_selected(asset, FRESHNESS):
            outcomes[FRESHNESS] = _freshness(stale)
        for name, outcome in outcomes.items():
            check_key = dg.AssetCheckKey(self.names.key(asset), name)
            if self.known.get((check_key, partition.key)) == Evaluation(outcome.passed, outcome.detail):
                continue
            is_blocking = (asset, name) in _BLOCKING
            self.record(
                dg.AssetCheckEvaluation(
                    asset_key=self.names.key(asset),
                    check_name=name,
                    passed=outcome.passed,
                    severity=dg.AssetCheckSeverity.ERROR if is_blocking else dg.AssetCheckSeverity.WARN,
                    description=outcome.detail,
                    metadata={**outcome.numbers},
                    blocking=is_blocking,
                    partition=partition.key,
                )
            )
        return outcomes

    def names_of(self, asset: str) -> list[str]:
        """Names of the selected checks of an asset, but for freshness."""
        return [spec.name for spec in CHECKS if spec.asset == asset and self._is_selected(asset, spec.name)]

    def _is_selected(self, asset: str, name: str) -> bool:
        return dg.AssetCheckKey(self.names.key(asset), name) in self.selected


def _freshness(stale: Mapping[str, Status]) -> Outcome:
    if not stale:
        return Outcome(True, "all three assets are fresh")
    if all(status.reasons == (READ_EACH_TIME,) for status in stale.values()):
        return Outcome(True, f"all three assets are as fresh as can be determined: {READ_EACH_TIME}")
    found = "; ".join(f"{asset} is {status.state}: {', '.join(status.reasons)}" for asset, status in stale.items())
    return Outcome(False, f"{found}; materialize it or run 'embed-assets sync'")

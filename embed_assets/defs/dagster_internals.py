"""Wraps every Dagster internal that the package uses, and refuses Dagster versions that it was not tested with."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster import AssetKey, DagsterEventType, DagsterInstance

from embed_assets.errors import SettingsError
from embed_assets.records import slices

_TESTED = re.compile(r"1\.13\.(\d+)")
_LEAST_PATCH = 6
"""Earlier patch releases skip assets downstream of the step in the same run."""


def check_version(version: str) -> None:
    """Raise ``SettingsError`` for a Dagster version whose internals may differ."""
    found = _TESTED.match(version)
    if found is None or int(found[1]) < _LEAST_PATCH:
        raise SettingsError(
            f"embed_assets needs Dagster 1.13.x, at least 1.13.{_LEAST_PATCH}, as it uses internals, got {version}; "
            "pip install 'dagster>=1.13.6,<1.14' 'dagster-webserver>=1.13.6,<1.14'"
        )


check_version(dg.__version__)

from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationPlanned  # noqa: E402
from dagster._core.definitions.partitions.subset import DefaultPartitionsSubset  # noqa: E402
from dagster._core.errors import raise_execution_interrupts  # noqa: E402
from dagster._core.execution.context.system import PlanOrchestrationContext  # noqa: E402
from dagster._core.execution.plan.plan import ExecutionPlan  # noqa: E402
from dagster._core.execution.retries import RetryMode  # noqa: E402
from dagster._core.executor.base import Executor  # noqa: E402
from dagster._core.executor.in_process import InProcessExecutor  # noqa: E402
from dagster._core.instance.config import PoolGranularity  # noqa: E402
from dagster._core.instance.ref import InstanceRef  # noqa: E402
from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable  # noqa: E402
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable  # noqa: E402
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage  # noqa: E402
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME as INDEX_SHARD  # noqa: E402
from dagster._core.storage.legacy_storage import LegacyEventLogStorage, LegacyRunStorage  # noqa: E402
from dagster._core.storage.runs.schema import KeyValueStoreTable  # noqa: E402
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage  # noqa: E402
from dagster._core.storage.sqlite import (  # noqa: E402
    LAST_KNOWN_STAMPED_SQLITE_ALEMBIC_REVISION as LAST_UNSTAMPED_REVISION,
)
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage  # noqa: E402
from dagster._serdes import ConfigurableClassData  # noqa: E402
from dagster_shared.error import SerializableErrorInfo  # noqa: E402
from sqlalchemy import func, select  # noqa: E402
from sqlalchemy.exc import IntegrityError  # noqa: E402

DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"
INPUT_VERSION_TAG = "dagster/input_data_version/"
INPUT_POINTER_TAG = "dagster/input_event_pointer/"
"""Prefix of tags with the storage id of a dependency's latest event, which Dagster's own staleness check compares."""
USER_PROVIDED_TAG = "dagster/data_version_is_user_provided"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
_IDS_PER_QUERY = 500
"""Old builds of SQLite take no more than 999 variables in a statement."""
_KEYS_PER_PLANNED_CHECK = 100
"""Each takes a statement to store, and a kilobyte in each row of a partition until the check is evaluated."""
_PLANNED = "PLANNED"
"""Status of a check evaluation that a run has planned and not recorded yet."""
_REGISTER_ATTEMPTS = 20
"""Each failed attempt means that another process added keys in between; a limit keeps a lasting error from looping."""
_NUMBERS = ("IntMetadataEntryData", "FloatMetadataEntryData")

__all__ = [
    "CODE_VERSION_TAG",
    "DATA_VERSION_TAG",
    "INDEX_SHARD",
    "INPUT_POINTER_TAG",
    "INPUT_VERSION_TAG",
    "LAST_UNSTAMPED_REVISION",
    "RANGE_END_TAG",
    "RANGE_START_TAG",
    "USER_PROVIDED_TAG",
    "ConfigurableClassData",
    "DagsterSqliteStorage",
    "Evaluation",
    "ExecutionPlan",
    "Executor",
    "InProcessExecutor",
    "InstanceRef",
    "LegacyEventLogStorage",
    "PlanOrchestrationContext",
    "RetryMode",
    "SerializableErrorInfo",
    "SqliteEventLogStorage",
    "StoredEvent",
    "delete_value",
    "drop_planned_evaluations",
    "error_of_run",
    "follow_default_limit",
    "free_slots",
    "holders_of_full_pool",
    "latest_attempts",
    "latest_evaluations",
    "latest_event_ids",
    "planned_checks_in_parts",
    "raise_execution_interrupts",
    "read_events",
    "read_values",
    "register_partitions",
    "write_value",
]


def error_of_run(event: dg.DagsterEvent) -> SerializableErrorInfo | None:
    """The error of a run failure event; None for any other event, step failures included."""
    is_of_run = event.event_type == DagsterEventType.RUN_FAILURE
    return event.job_failure_data.error if is_of_run else None


def register_partitions(instance: DagsterInstance, name: str, keys: Sequence[str]) -> None:
    """Add keys to dynamic partitions, even while another process adds the same ones.

    Dagster selects the new keys and then inserts them in one statement, which fails if another process inserted one in
    between. Raises ``sqlalchemy.exc.IntegrityError`` if that happens again and again.
    """
    for attempt in range(_REGISTER_ATTEMPTS):
        try:
            instance.add_dynamic_partitions(name, keys)
            return
        except IntegrityError:
            if attempt == _REGISTER_ATTEMPTS - 1:
                raise


def latest_event_ids(
    instance: DagsterInstance, asset: AssetKey, keys: Collection[str] | None, observations: bool = False
) -> dict[str, int]:
    """Storage ids of the latest materialization (or observation) of each partition, by key, in one query.

    With `keys` None, those of all partitions.
    """
    kind = DagsterEventType.ASSET_OBSERVATION if observations else DagsterEventType.ASSET_MATERIALIZATION
    return dict(instance.get_latest_storage_id_by_partition(asset, kind, None if keys is None else set(keys)))


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """The fields of a materialization or observation that staleness is computed from."""

    storage_id: int
    run_id: str
    """'' if it was recorded outside of runs."""
    partition: str
    timestamp: float
    """When it was recorded, in seconds since 1970."""
    tags: Mapping[str, str]
    numbers: Mapping[str, float]
    """Metadata entries that are numbers, by name."""
    texts: Mapping[str, str]
    """Metadata entries that are plain text, by name."""


def read_events(instance: DagsterInstance, storage_ids: Sequence[int]) -> Iterator[StoredEvent]:
    """Read the stored events of partitions with these ids. Raises ``SettingsError`` unless Dagster's storage is SQL.

    Five times faster than Dagster's own reader, which builds an object for every metadata entry.
    """
    table = SqlEventLogStorageTable
    with _sql_storage(instance).index_connection() as connection:
        for ids in slices(storage_ids, _IDS_PER_QUERY):
            columns = (table.c.id, table.c.run_id, table.c.partition, table.c.event)
            for storage_id, run_id, partition, text in connection.execute(select(*columns).where(table.c.id.in_(ids))):
                yield _stored_event(storage_id, run_id, partition, json.loads(text))


def _sql_storage(instance: DagsterInstance) -> SqlEventLogStorage:
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        raise SettingsError(
            f"embed_assets reads Dagster's event log from an SQL database, got {type(storage).__name__}; "
            "configure sqlite or postgres storage in dagster.yaml"
        )
    return storage


def _stored_event(storage_id: int, run_id: str, partition: str, entry: dict[str, Any]) -> StoredEvent:
    data = entry["dagster_event"]["event_specific_data"]
    event = data.get("materialization") or data["asset_observation"]
    values = [(e["label"], e["entry_data"]) for e in event["metadata_entries"]]
    numbers = {n: float(v["value"]) for n, v in values if v["__class__"] in _NUMBERS and v["value"] is not None}
    texts = {n: v["text"] for n, v in values if v["__class__"] == "TextMetadataEntryData"}
    tags = event.get("tags") or {}
    return StoredEvent(storage_id, run_id or "", partition, float(entry["timestamp"]), tags, numbers, texts)


def latest_attempts(instance: DagsterInstance, asset: AssetKey) -> dict[str, tuple[int, str]]:
    """(storage id, run id) of the latest planned materialization of each partition, by key."""
    kind = DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    latest = instance.get_latest_storage_id_by_partition(asset, kind)
    runs = _run_ids(instance, sorted(latest.values()))
    return {key: (storage_id, runs[storage_id]) for key, storage_id in latest.items() if storage_id in runs}


def _run_ids(instance: DagsterInstance, storage_ids: Sequence[int]) -> dict[int, str]:
    table = SqlEventLogStorageTable
    found: dict[int, str] = {}
    with _sql_storage(instance).index_connection() as connection:
        for ids in slices(storage_ids, _IDS_PER_QUERY):
            found.update(map(tuple, connection.execute(select(table.c.id, table.c.run_id).where(table.c.id.in_(ids)))))
    return found


def holders_of_full_pool(instance: DagsterInstance, pool: str) -> list[str]:
    """Ids of the runs that hold slots of a pool, if it has none left and steps have to wait; else an empty list."""
    granularity = instance.get_concurrency_config().pool_config.pool_granularity
    if granularity == PoolGranularity.RUN:  # then Dagster's run queue enforces the limit
        return []
    info = instance.event_log_storage.get_concurrency_info(pool)
    return sorted(info.active_run_ids) if 0 < info.slot_count <= info.active_slot_count else []


def follow_default_limit(instance: DagsterInstance, pool: str) -> None:
    """Apply a changed default limit of dagster.yaml to a pool that has no limit of its own.

    Dagster does so too, but on PostgreSQL its update fails, and so does every run that uses the pool:
    https://github.com/dagster-io/dagster/issues/33552
    """
    default = instance.get_concurrency_config().pool_config.default_pool_limit
    for known in instance.event_log_storage.get_pool_limits():
        if known.name == pool and known.from_default and known.limit != default:
            instance.event_log_storage.delete_concurrency_limit(pool)  # Dagster creates it again when needed


def free_slots(instance: DagsterInstance, run_id: str) -> None:
    """Free all pool slots that a run holds."""
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def write_value(instance: DagsterInstance, key: str, value: str) -> None:
    """Store a value in the instance, replacing the previous one."""
    instance.run_storage.set_cursor_values({key: value})


def read_values(instance: DagsterInstance, keys: set[str]) -> Mapping[str, str]:
    """The stored values of these keys; keys without a value are left out."""
    return instance.run_storage.get_cursor_values(keys) if keys else {}


def delete_value(instance: DagsterInstance, key: str) -> None:
    """Delete a stored value, for which Dagster has no method; does nothing if the run storage is not SQL."""
    storage = instance.run_storage
    sql = storage._storage.run_storage if isinstance(storage, LegacyRunStorage) else storage
    if isinstance(sql, SqlRunStorage):
        with sql.connect() as connection:
            connection.execute(KeyValueStoreTable.delete().where(KeyValueStoreTable.c.key == key))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of a check on a partition."""

    passed: bool
    description: str
    """'' if the check gave none."""


def latest_evaluations(
    instance: DagsterInstance, run_id: str, checks: Collection[dg.AssetCheckKey], partitions: Sequence[str]
) -> dict[tuple[dg.AssetCheckKey, str], Evaluation]:
    """The latest evaluation by check and partition, leaving out those of the run `run_id` itself.

    Also left out is a pair that a run which died had planned to evaluate since.
    """
    table, found = AssetCheckExecutionsTable, {}
    by_name = {(check.asset_key.to_string(), check.name): check for check in checks}
    latest = (
        select(func.max(table.c.id))
        .where(table.c.asset_key.in_({asset for asset, _ in by_name}), table.c.run_id != run_id)
        .group_by(table.c.asset_key, table.c.check_name, table.c.partition)
    )
    with _sql_storage(instance).index_connection() as connection:
        for keys in slices(partitions, _IDS_PER_QUERY):
            ids = latest.where(table.c.partition.in_(keys))
            columns = (table.c.asset_key, table.c.check_name, table.c.partition, table.c.evaluation_event)
            is_evaluated = table.c.id.in_(ids) & (table.c.execution_status != _PLANNED)
            for asset, name, key, event in connection.execute(select(*columns).where(is_evaluated)):
                if (asset, name) in by_name:
                    data = json.loads(event)["dagster_event"]["event_specific_data"]
                    evaluation = Evaluation(bool(data["success"]), data.get("description") or "")
                    found[by_name[asset, name], key] = evaluation
    return found


def drop_planned_evaluations(instance: DagsterInstance, run_id: str, checks: Collection[dg.AssetCheckKey]) -> None:
    """Delete the evaluations that a run planned and did not record, so that earlier ones stay current in the UI.

    Dagster would show the checks as skipped; specs can't be optional: https://github.com/dagster-io/dagster/issues/28461
    """
    table = AssetCheckExecutionsTable
    with _sql_storage(instance).index_connection() as connection:
        for check in checks:
            is_check = (table.c.asset_key == check.asset_key.to_string()) & (table.c.check_name == check.name)
            is_planned = (table.c.run_id == run_id) & (table.c.execution_status == _PLANNED)
            connection.execute(table.delete().where(is_check & is_planned))


def planned_checks_in_parts(event: dg.EventLogEntry) -> Iterator[dg.EventLogEntry]:
    """The event, or if a run over many partitions plans a check, the same event for some of them at a time."""
    planned = event.dagster_event.event_specific_data if event.dagster_event else None
    if not isinstance(planned, AssetCheckEvaluationPlanned) or planned.partitions_subset is None:
        yield event
        return
    for keys in slices(sorted(planned.partitions_subset.get_partition_keys()), _KEYS_PER_PLANNED_CHECK):
        some = AssetCheckEvaluationPlanned(
            asset_key=planned.asset_key,
            check_name=planned.check_name,
            partitions_subset=DefaultPartitionsSubset(set(keys)),
        )
        assert event.dagster_event is not None
        yield event._replace(dagster_event=event.dagster_event._replace(event_specific_data=some))

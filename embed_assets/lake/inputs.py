"""Noticing that another run replaced what this one reads, so that newer rows are never overwritten by older ones.

There is no lock and no clock in it. A stage notes which files hold the rows it reads, and looks again after it has
opened the table it writes to and before it commits. Whoever replaces the inputs after that look has its own commit to
the same partition still before it, which wins; whoever did before it is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.reader import PartitionState, content_version, partition_state
from embed_assets.lake.tables import Lake, TableSpec


class Inputs:
    """The rows of one partition that a stage reads, as they were when it began or when they were written."""

    def __init__(self, lake: Lake, key: str, tables: Sequence[TableSpec], known: Sequence[PartitionState] = ()) -> None:
        self._lake, self._key = lake, key
        states = {state.table.path: state for state in known}
        self._states = [states.get(table.path) or partition_state(lake, table, key) for table in tables]

    def check(self) -> None:
        """Raise ``SupersededError`` when other rows took the place of any of them."""
        for state in self._states:
            if self._is_replaced(state):
                raise SupersededError(
                    f"partition {self._key!r}: another run replaced its {state.table.path} while this one worked on "
                    "the older ones, so its own were not written; the newer ones stand, see 'embed-assets plan'",
                    is_retryable=True,
                )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """An error whose cause is that the inputs were replaced meanwhile is told as that."""
        try:
            yield
        except SupersededError:
            raise
        except Exception as error:
            try:
                self.check()
            except SupersededError:
                raise
            except LakeError:
                raise error from None  # what can't be compared does not explain it
            raise

    def _is_replaced(self, state: PartitionState) -> bool:
        now = partition_state(self._lake, state.table, self._key)
        if now.version == state.version or now.files == state.files:
            return False
        if state.version is None:
            return True
        # Compaction makes other files of the same rows.
        before, after = (content_version(self._lake, state.table, self._key, v) for v in (state.version, now.version))
        return before != after

"""Recovers from failed batches at the least cost.

Out of memory: the batch runs in smaller pieces. Transient errors: it is retried. A text that the model can't embed: it
is found by bisection and rejected.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from embed_assets.engine.backend import Backend, Fetched
from embed_assets.engine.batching import Batch, plan_part
from embed_assets.engine.faults import is_models_fault, is_out_of_memory, is_transient, reason_of
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import EmbeddingError

_ATTEMPTS = 4
"""With the default backoff, the waits add up to 3.5 s at most: enough for a hiccup, little lost on a lasting fault."""
_MAX_WAIT_SECONDS = 8.0
"""Limit of one wait: the device is idle meanwhile."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """The result of running a batch."""

    max_batch_tokens: int
    """The token budget from now on; lower than before if memory ran out."""
    padded_tokens: int = 0
    """Tokens that the device computed, including padding."""
    rejected: dict[int, str] = field(default_factory=dict)
    """Row to reason, for texts without a vector."""


class Recovery:
    """Re-runs batches that failed on a backend."""

    def __init__(self, backend: Backend, probe: TokenizedTexts, backoff_seconds: float) -> None:
        """`probe` is a short tokenized text that any healthy model can embed; `backoff_seconds` scales the waits."""
        self._backend, self._probe = backend, probe
        self._retrying = Retrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=backoff_seconds, max=_MAX_WAIT_SECONDS),
            retry=retry_if_exception(is_transient),
            before_sleep=lambda state: _log.warning(
                "a batch failed, retrying it (attempt %d of %d): %s",
                state.attempt_number,
                _ATTEMPTS,
                state.outcome and reason_of(state.outcome.exception() or Exception()),
            ),
            reraise=True,
        )

    def run(
        self,
        texts: Sequence[str],
        tokens: TokenizedTexts,
        batch: Batch,
        buffer: Any,
        max_batch_tokens: int,
        failure: Exception,
    ) -> Outcome:
        """Write the vectors of a batch, whose first attempt raised `failure`, to its rows of `buffer`.

        Out of memory halves the budget and re-runs this batch in pieces. Transient errors are retried with exponential
        backoff and jitter. After that, and after any other error, the batch is bisected to isolate the texts at fault.
        Raises the original error when the model itself is at fault, and ``EmbeddingError`` when there is not enough
        memory for a single text.
        """
        outcome = Outcome(max_batch_tokens)
        waiting = [batch]
        is_last_try = False
        known: Exception | None = failure
        while waiting:
            part = waiting.pop()
            is_patient = part is batch or len(part.rows) == 1
            error, known = self._attempt(texts, tokens, part, buffer, is_patient, known), None
            if error is None:
                outcome.padded_tokens += part.tokens
            elif is_out_of_memory(error):
                self._backend.release_memory()
                if len(part.rows) > 1:
                    waiting += self._smaller(tokens, part, outcome)
                elif is_last_try:
                    raise EmbeddingError(
                        f"there is not enough memory on {self._backend.device} for one text of {part.tokens} tokens "
                        f"({reason_of(error)}); free memory there, or choose a smaller EMBED_MODEL"
                    ) from error
                else:
                    is_last_try = True
                    waiting.append(part)
            elif is_models_fault(error):
                raise error
            elif len(part.rows) == 1:
                self.check_health(error)
                outcome.rejected[int(part.rows[0])] = reason_of(error)
            else:
                self.check_health(error)
                half = len(part.rows) // 2
                waiting += self._parts(tokens, part.rows[half:]) + self._parts(tokens, part.rows[:half])
        return outcome

    def embed_alone(self, texts: Sequence[str], tokens: TokenizedTexts, row: int) -> Fetched:
        """The vector of one text, computed in a batch of its own."""
        ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        alone = TokenizedTexts(ids, np.array([0, len(ids)]), tokens.is_truncated[row : row + 1])
        buffer = self._backend.new_buffer(1)
        for part in self._parts(alone, np.array([0])):
            self._backend.forward([texts[row]], alone, part, buffer)
        return self._backend.fetch(buffer)

    def check_health(self, error: Exception) -> None:
        """Raise `error` if the model can't embed a harmless text either, since then no text is to blame."""
        try:
            alone = self.embed_alone(["a"], self._probe, 0)
        except Exception:
            raise error from None
        if not alone.is_usable[0]:
            raise error

    def _attempt(
        self,
        texts: Sequence[str],
        tokens: TokenizedTexts,
        part: Batch,
        buffer: Any,
        is_patient: bool,
        known: Exception | None,
    ) -> Exception | None:
        """Run a part; returns its error, or None on success. `known` is the error of a first attempt already made."""

        def forward() -> None:
            nonlocal known
            if known is not None:
                failure, known = known, None
                raise failure
            self._backend.forward(texts, tokens, part, buffer)

        try:
            if is_patient:
                self._retrying.copy()(forward)
            else:
                forward()
        except Exception as error:
            # An error holds the frames of its traceback, and they hold the activations that a smaller batch needs room
            # for: https://github.com/pytorch/pytorch/issues/27600.
            traceback.clear_frames(error.__traceback__)
            return error
        return None

    def _smaller(self, tokens: TokenizedTexts, part: Batch, outcome: Outcome) -> list[Batch]:
        outcome.max_batch_tokens = max(1, min(outcome.max_batch_tokens, part.tokens // 2))
        _log.warning(
            "out of memory with %d tokens; EMBED_MAX_BATCH_TOKENS is %d for the rest of this process",
            part.tokens,
            outcome.max_batch_tokens,
        )
        return plan_part(part.rows, tokens.lengths, outcome.max_batch_tokens, self._backend.layout)

    def _parts(self, tokens: TokenizedTexts, rows: np.ndarray) -> list[Batch]:
        """The rows as one batch, or as few as the layout's maximum of rows allows."""
        return plan_part(rows, tokens.lengths, 1 << 62, self._backend.layout)

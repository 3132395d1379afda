"""The runner over a scripted backend: order, windows in flight, out of memory, retries, poisoned texts, stopping."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.engine.backend import Fetched, Window
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.faults import is_out_of_memory, is_transient
from embed_assets.engine.providers.fake import MAX_LENGTH, FakeBackend
from embed_assets.engine.providers.fake import resolve as fake_space
from embed_assets.engine.space import ModelChoice
from embed_assets.engine.tokenization import ModelTokenizer, TokenizedTexts, word_tokenizer_json
from embed_assets.errors import EmbeddingError


class Scripted(FakeBackend):
    """The fake model on a device that fails as the test specifies."""

    def __init__(
        self,
        before: Callable[[list[str], Batch], None] = lambda texts, batch: None,
        workers: int = 1,
        layout: Layout | None = None,
    ) -> None:
        super().__init__(fake_space(ModelChoice("fake:8")), layout)
        self._before, self.workers = before, workers
        self.batches: list[list[str]] = []
        self.released = 0

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: np.ndarray) -> None:
        chosen = [texts[row] for row in batch.rows]
        self._before(chosen, batch)
        self.batches.append(chosen)
        super().forward(texts, tokens, batch, buffer)
        for row in batch.rows:
            if "nan" in texts[row]:
                buffer[row, 3] = np.nan

    def release_memory(self) -> None:
        self.released += 1


def embedder_over(backend: Scripted, budget: int = 64, **options: Any) -> LocalEmbedder:
    return LocalEmbedder(
        backend, ModelTokenizer(word_tokenizer_json()), MAX_LENGTH, budget, backoff_seconds=0.001, **options
    )


def expected(texts: Sequence[str]) -> np.ndarray:
    return embedder_over(Scripted()).embed(texts).vectors


TEXTS = [f"{'word ' * (n % 13)}{n}" for n in range(60)]


@given(
    st.lists(st.text("ab ", max_size=40), max_size=60),
    st.integers(1, 200),
    st.integers(1, 4),
    st.sampled_from([Layout(), Layout(is_packed=True), Layout(width_multiple=8)]),
    st.integers(1, 60),
)
@settings(deadline=None, max_examples=60)
def test_windows_budgets_layouts_and_workers_change_no_vector(
    texts: list[str], budget: int, workers: int, layout: Layout, size: int
) -> None:
    embedder = embedder_over(Scripted(workers=workers, layout=layout), budget)
    windows = [texts[start : start + size] for start in range(0, len(texts), size)]
    found = [embedded.vectors for embedded in embedder.embed_windows(map(Window, windows))]
    assert [len(vectors) for vectors in found] == [len(window) for window in windows]
    alone = [embedder_over(Scripted()).embed([text]).vectors[0] for text in texts]
    assert np.array_equal(np.concatenate([*found, np.empty((0, 8))]), np.array(alone).reshape(-1, 8))


def test_the_next_window_is_read_while_one_is_on_the_device() -> None:
    read: list[int] = []
    on_device = threading.Event()
    two_are_read = threading.Event()

    def wait_for_the_reader(texts: list[str], batch: Batch) -> None:
        on_device.set()
        assert two_are_read.wait(20), "the reader did not go on while the device computed"

    def windows() -> Iterator[Window]:
        for number in range(4):
            read.append(number)
            if number == 1:
                assert on_device.wait(20)
                two_are_read.set()
            yield Window([f"text {number}"])

    stream = embedder_over(Scripted(wait_for_the_reader)).embed_windows(windows())
    next(stream)
    assert len(read) == 2  # never more than two windows are held
    assert len(list(stream)) == 3


def memory_of(tokens: int) -> Callable[[list[str], Batch], None]:
    def check(texts: list[str], batch: Batch) -> None:
        if batch.tokens > tokens:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return check


@pytest.mark.parametrize("layout", [Layout(), Layout(is_packed=True)])
def test_out_of_memory_halves_the_budget_and_runs_only_that_batch_again(layout: Layout) -> None:
    backend = Scripted(memory_of(40), layout=layout)
    embedder = embedder_over(backend, 200)
    embedded = embedder.embed(TEXTS)
    assert np.array_equal(embedded.vectors, expected(TEXTS))
    assert not embedded.rejected
    assert embedder.max_batch_tokens <= 40
    assert sorted(text for batch in backend.batches for text in batch) == sorted(TEXTS)  # each was computed once
    released = backend.released
    assert released >= 1
    embedder.embed(TEXTS)
    assert backend.released == released  # the smaller budget fits, and stays


def test_a_failed_pass_holds_no_memory_while_a_smaller_one_is_tried() -> None:
    """A device with room for 60 tokens, whose passes hold their memory while their frames are alive."""
    import gc
    import weakref

    class Activations:
        """Memory that a pass holds on its device."""

    alive: weakref.WeakSet[Activations] = weakref.WeakSet()

    def forward_pass(texts: list[str], batch: Batch) -> None:
        held = [Activations() for _ in range(batch.tokens)]
        alive.update(held)
        if len(alive) > 60:
            raise RuntimeError("CUDA out of memory")

    backend = Scripted(forward_pass)
    embedded = embedder_over(backend, 200).embed(["word " * 48] * 4)
    assert not embedded.rejected and len(backend.batches) == 4
    gc.collect()


def test_out_of_memory_on_a_single_text_is_an_error() -> None:
    with pytest.raises(EmbeddingError, match=r"not enough memory on cpu for one text of \d+ tokens"):
        embedder_over(Scripted(memory_of(3))).embed(TEXTS)


def test_transient_errors_are_retried(logged: list[str]) -> None:
    failures = iter([OSError("the device went away"), RuntimeError("hiccup")])

    def fail_at_first(texts: list[str], batch: Batch) -> None:
        if (error := next(failures, None)) is not None:
            raise error

    embedded = embedder_over(Scripted(fail_at_first)).embed(TEXTS)
    assert not embedded.rejected
    assert np.array_equal(embedded.vectors, expected(TEXTS))
    assert "retrying it (attempt 1" in " ".join(logged) and "went away" in " ".join(logged)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_poisoned_text_is_found_by_bisection_and_the_rest_goes_on(error: type[Exception], workers: int) -> None:
    def choke(texts: list[str], batch: Batch) -> None:
        if any("poison" in text for text in texts):
            raise error("the kernel chokes")

    texts = [*TEXTS[:20], "a poison", *TEXTS[20:40], "poison two", *TEXTS[40:]]
    embedded = embedder_over(Scripted(choke, workers), 500).embed(texts)
    assert embedded.rejected == dict.fromkeys([20, 41], f"{error.__name__}: the kernel chokes")
    good = [row for row in range(len(texts)) if row not in embedded.rejected]
    assert np.array_equal(embedded.vectors[good], expected([texts[row] for row in good]))
    assert not embedded.vectors[[20, 41]].any()


def test_a_vector_that_is_not_finite_rejects_only_its_text() -> None:
    texts = [*TEXTS[:5], "a nan here", *TEXTS[5:]]
    embedded = embedder_over(Scripted()).embed(texts)
    assert embedded.rejected == {5: "the model's vector is zero or not finite in float32"}
    assert np.isfinite(embedded.vectors).all()
    with pytest.raises(EmbeddingError, match=r"'a nan here' could not be embedded: the model's vector is zero"):
        embedder_over(Scripted()).embed_one("a nan here")


def test_a_model_that_embeds_nothing_rejects_no_text() -> None:
    def broken(texts: list[str], batch: Batch) -> None:
        raise ValueError("the model is broken")

    with pytest.raises(ValueError, match="the model is broken") as caught:
        embedder_over(Scripted(broken)).embed(TEXTS)
    assert "broken" in [frame.name for frame in caught.traceback]  # the original traceback survives the threads


def test_a_model_that_is_never_finite_rejects_no_text() -> None:
    class AlwaysNan(Scripted):
        def fetch(self, buffer: np.ndarray) -> Fetched:
            return Fetched.normalized(np.full_like(buffer, np.nan))

    with pytest.raises(EmbeddingError, match="not finite in float32 for any text; set another EMBED_PRECISION"):
        embedder_over(AlwaysNan()).embed(TEXTS)


def test_an_error_in_the_tokenizer_or_the_reader_is_raised_unchanged() -> None:
    def windows() -> Iterator[Window]:
        yield Window(["one"])
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        list(embedder_over(Scripted()).embed_windows(windows()))
    with pytest.raises(TypeError):
        embedder_over(Scripted()).embed([3])  # type: ignore[list-item]


@pytest.mark.parametrize("workers", [1, 2])
def test_leaving_early_stops_after_the_current_batch(workers: int) -> None:
    backend = Scripted(lambda texts, batch: time.sleep(0.02), workers)
    embedder = embedder_over(backend, 1)
    stream = embedder.embed_windows(map(Window, [TEXTS[:4], TEXTS, TEXTS]))
    next(stream)
    stream.close()
    done = len(backend.batches)
    assert done < 40
    time.sleep(0.1)
    assert len(backend.batches) == done
    assert np.array_equal(embedder.embed(TEXTS[:4]).vectors, expected(TEXTS[:4]))  # the embedder can be used again


def test_ticks_are_called_in_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embed_assets.engine.embedder.TICK_SECONDS", 0.02)
    heard: list[tuple[int, int, int]] = []
    embedder = embedder_over(Scripted(lambda texts, batch: time.sleep(0.05)), 30)
    stream = embedder.embed_windows(
        [Window(TEXTS)], lambda texts, tokens: heard.append((threading.get_ident(), texts, tokens))
    )
    total = sum(embedded.stats.tokens for embedded in stream)
    assert {thread for thread, _, _ in heard} == {threading.get_ident()}
    assert [texts for _, texts, _ in heard] == sorted(texts for _, texts, _ in heard)
    assert 0 < heard[-1][1] <= len(TEXTS) and heard[-1][2] <= total


def test_stats_report_padding_and_waits() -> None:
    stats = embedder_over(Scripted(), 1000).embed(["one", "one two three"]).stats
    assert (stats.texts, stats.tokens, stats.padded_tokens) == (2, 8, 10)
    assert stats.padding_percent == pytest.approx(20)
    assert (
        embedder_over(Scripted(layout=Layout(is_packed=True)), 1000).embed(["one", "one two"]).stats.padding_percent
        == 0
    )


class OutOfMemoryError(RuntimeError):
    """Has the name of the error that torch.cuda raises."""


@pytest.mark.parametrize(
    ("error", "memory", "transient"),
    [
        (OutOfMemoryError("CUDA out of memory"), True, False),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.07 GB)"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True, False),
        (RuntimeError("std::bad_alloc"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: unspecified launch failure"), False, True),
        (ConnectionError("reset"), False, True),
        (IndexError("index out of range in self"), False, False),
        (ValueError("out of memory of things"), False, False),
        (KeyboardInterrupt(), False, False),
    ],
)
def test_errors_are_classified(error: BaseException, memory: bool, transient: bool) -> None:
    assert (is_out_of_memory(error), is_transient(error)) == (memory, transient)


def test_the_log_names_what_was_shrunk(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        embedder_over(Scripted(memory_of(40)), 200).embed(TEXTS)
    assert "EMBED_MAX_BATCH_TOKENS is" in caplog.text

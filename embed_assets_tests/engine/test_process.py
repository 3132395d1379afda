"""The model in a process of its own: the same results, errors, logs and stops as in this one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from embed_assets.engine.backend import Window
from embed_assets.engine.engine import Engine
from embed_assets.engine.process import ModelProcess
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import EmbeddingError, ModelError, SettingsError
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space

TEXTS = ["one", "two words", "", "one", "naïve 東京 🙂"]


@pytest.fixture
def process() -> Iterator[ModelProcess]:
    made = ModelProcess(resolve_space("fake:8"), EngineOptions())
    yield made
    made.close()


def child_of(process: ModelProcess) -> psutil.Process:
    assert process._process is not None
    return psutil.Process(process._process.pid)


def test_vectors_are_those_of_the_model_in_this_process(process: ModelProcess) -> None:
    process.load(TEXTS, 10)
    assert (process.dimension, process.info.backend) == (8, "fake")
    here = Engine(resolve_space("fake:8"), EngineOptions()).embedder.embed(TEXTS)
    windows = [Window(TEXTS, [str(i) for i in range(5)]), Window(["three"]), Window([]), Window(TEXTS)]
    found = list(process.embed_windows(windows))
    assert [done.window for done in found] == windows
    assert [len(done.vectors) for done in found] == [5, 1, 0, 5]
    for done in (found[0], found[3]):
        assert (done.vectors == here.vectors).all() and (done.is_truncated == here.is_truncated).all()
        assert (done.stats.texts, done.stats.tokens) == (here.stats.texts, here.stats.tokens)
    assert list(process.embed_windows([])) == []
    assert len(list(process.embed_windows([Window(["again"])]))) == 1


def test_known_tokens_are_used(process: ModelProcess) -> None:
    process.load([], 0)
    tokens = TokenizedTexts(np.arange(7, dtype=np.int32), np.array([0, 3, 7]), np.zeros(2, bool))
    [done] = process.embed_windows([Window(["one", "two"], (), tokens)])
    assert done.stats.tokens == 7


def test_files_are_gone_afterwards(process: ModelProcess) -> None:
    process.load([], 0)
    pid = child_of(process).pid
    for texts in (1, 20_000):  # of which the second is stopped in the middle
        windows = process.embed_windows(Window([f"text {n}" for n in range(texts)]) for _ in range(10))
        next(windows)
        windows.close()
    assert len(list(process.embed_windows([Window(["after"])]))) == 1
    assert child_of(process).pid == pid
    assert os.listdir(process._folder.path) == ["lock"]


def test_a_killed_process_is_an_error_that_passes(process: ModelProcess) -> None:
    process.load([], 0)
    child_of(process).kill()
    with pytest.raises(EmbeddingError, match="ended with signal 9, perhaps for lack of memory") as caught:
        list(process.embed_windows([Window(["one"])]))
    assert caught.value.is_retryable
    process.load([], 0)
    assert len(list(process.embed_windows([Window(["one"])]))) == 1


def test_errors_of_the_caller_leave_the_process_usable(process: ModelProcess) -> None:
    process.load([], 0)
    pid = child_of(process).pid

    def windows() -> Iterator[Window]:
        yield Window(["one"])
        raise ValueError("the lake is gone")

    with pytest.raises(ValueError, match="the lake is gone"):
        list(process.embed_windows(windows()))
    assert len(list(process.embed_windows([Window(["one"])]))) == 1
    assert child_of(process).pid == pid


def test_an_interrupt_ends_the_process(process: ModelProcess) -> None:
    process.load([], 0)
    child = child_of(process)

    def windows() -> Iterator[Window]:
        yield Window(["one"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(process.embed_windows(windows()))
    assert not child.is_running()


def test_errors_of_loading_are_raised_where_the_model_is_needed() -> None:
    process = ModelProcess(resolve_space(SAMPLE_MODEL), EngineOptions(device="cuda:7"))
    process.start()  # raises nothing
    for _ in range(2):
        with pytest.raises((SettingsError, ModelError), match=r"(?i)cuda"):
            process.load(["a"], 1)
    process.close()


def test_the_childs_log_is_passed_on(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no tuning is remembered
    process = ModelProcess(resolve_space(SAMPLE_MODEL), EngineOptions(max_batch_tokens=64))
    with caplog.at_level(logging.INFO, "embed_assets"):
        process.load(["a text"], 3000)
    assert "finding the fastest library and budget" in caplog.text
    process.close()


def test_the_process_ends_with_its_parent(process: ModelProcess) -> None:
    process.load([], 0)
    child = child_of(process)
    assert process._process is not None and process._process.stdin is not None
    process._process.stdin.close()  # as when the parent dies
    child.wait(timeout=60)

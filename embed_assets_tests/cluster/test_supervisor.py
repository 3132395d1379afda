"""The supervisor's rules, with workers and a clock that the test controls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from embed_assets.cluster.driver import reason_of_loss
from embed_assets.cluster.nodes import Cluster, Node, Replicas
from embed_assets.cluster.report import PoolReport
from embed_assets.cluster.supervisor import Finished, Lost, Patience, Status, Supervisor, Then
from embed_assets.cluster.worker import Done, Place, Reply
from embed_assets.engine.metrics import EngineStats
from embed_assets.errors import EmbeddingError, ModelError, SettingsError, UserError
from embed_assets_tests.cluster.clusters import INFO

STOP = EmbeddingError("the test is over")


class Worker:
    """A worker whose calls end when the test says so."""

    def __init__(self) -> None:
        self.then: dict[str, Then] = {}
        self.windows: list[tuple[Any, bool, Then]] = []
        """Content, whether it is a retry, and what to call; those that were not answered."""
        self.is_killed = False

    def call(self, method: str, then: Then, *arguments: Any) -> None:
        if method == "run":
            content, is_retry = arguments
            self.windows.append((content.decode(), is_retry, then))
        else:
            self.then[method] = then

    def kill(self) -> None:
        self.is_killed = True

    @property
    def contents(self) -> list[Any]:
        return [content for content, _, _ in self.windows]


class Scene:
    """A supervisor, its workers in the order of their start, and what it told."""

    def __init__(self, least: int = 2, most: int = 2, scales_down: bool = False, nodes: str = "ab") -> None:
        self.now, self.workers, self.told = 100.0, list[Worker](), list[Any]()
        self.nodes = [Node(name, 1, 0, 1) for name in nodes]
        self.supervisor = Supervisor(
            Cluster("head:1", "", False), self.nodes, Replicas(least, most, 1, 0.0, scales_down), self._start,
            self.told.append, Patience(), lambda: self.now,
        )  # fmt: skip
        self.count = 0
        self.thread = threading.Thread(target=self.supervisor.run, daemon=True)
        self.thread.start()
        self.settle()

    def _start(self) -> Worker:
        self.workers.append(Worker())
        return self.workers[-1]

    def settle(self) -> None:
        """Wait until all events were performed."""
        done = threading.Event()
        self.supervisor._events.put(done.set)
        while self.thread.is_alive() and not done.wait(0.01):
            pass

    def load(self, *nodes: str) -> None:
        """Have the workers that were not placed start on these nodes and load the model."""
        waiting = [worker for worker in self.workers if "place" in worker.then and not worker.is_killed]
        for worker, node in zip(waiting, nodes, strict=False):
            worker.then.pop("place")(Place(node, f"host {node}"))
            self.settle()
            worker.then.pop("load")(INFO)
        self.settle()

    def submit(self, count: int) -> None:
        for _ in range(count):
            self.supervisor.submit(self.count, f"window {self.count}".encode())
            self.count += 1
        self.settle()

    def reply(
        self, worker: int, result: Done | UserError | None = None, seconds: float = 1.0, reason: str = ""
    ) -> None:
        """Have a worker answer its first window: with `result`, or if there is a reason, that it is broken."""
        content, _, then = self.workers[worker].windows.pop(0)
        done = None if reason else result or Done(str(content), EngineStats(texts=1, tokens=10, seconds=seconds))
        then(Reply(done, reason, seconds, INFO, []))
        self.settle()

    def lose(self, worker: int, reason: str = "it died") -> None:
        """Have all calls of a worker end with its loss."""
        for _, _, then in self.workers[worker].windows:
            then(Lost(reason))
        for then in self.workers[worker].then.values():
            then(Lost(reason))
        self.settle()

    def look(self, nodes: Sequence[Node] | None = None, after: float = 2.0) -> None:
        self.now += after
        self.supervisor.look(self.nodes if nodes is None else nodes)
        self.settle()

    @property
    def finished(self) -> dict[int, Any]:
        return {told.number: told.result for told in self.told if isinstance(told, Finished)}

    @property
    def over(self) -> UserError | None:
        return next((told for told in self.told if isinstance(told, UserError)), None)

    @property
    def report(self) -> PoolReport:
        return next(told.report for told in reversed(self.told) if isinstance(told, Finished | Status))

    @property
    def news(self) -> str:
        return "\n".join(told for told in self.told if isinstance(told, str))


@pytest.fixture
def scene() -> Scene:
    made = Scene()
    made.load("a", "b")
    return made


def test_windows_go_to_the_worker_with_the_least_to_do(scene: Scene) -> None:
    scene.submit(5)
    assert [worker.contents for worker in scene.workers] == [["window 0", "window 2"], ["window 1", "window 3"]]
    scene.reply(1)
    assert scene.workers[1].contents == ["window 3", "window 4"]
    assert scene.finished[1] == Done("window 1", EngineStats(texts=1, tokens=10, seconds=1.0))


def test_no_window_is_given_before_the_model_is_loaded() -> None:
    scene = Scene(least=1, most=1)
    scene.submit(1)
    [worker] = scene.workers
    worker.then.pop("place")(Place("a", "host a"))
    scene.settle()
    assert worker.contents == [] and not any(isinstance(told, Status) and told.is_ready for told in scene.told)
    worker.then.pop("load")(INFO)
    scene.settle()
    assert worker.contents == ["window 0"]
    assert any(isinstance(told, Status) and told.is_ready for told in scene.told)


def test_an_error_of_the_user_is_the_windows_result_and_nothing_more(scene: Scene) -> None:
    scene.submit(1)
    scene.reply(0, ModelError("not this one"))
    assert str(scene.finished[0]) == "not this one"
    assert not scene.workers[0].is_killed and len(scene.workers) == 2


def test_a_lost_workers_windows_go_to_others_the_first_of_them_first(scene: Scene) -> None:
    scene.submit(5)
    scene.lose(0)
    assert scene.workers[0].is_killed and "host a was lost (it died); its 2 windows" in scene.news
    scene.reply(1)
    assert scene.workers[1].contents == ["window 3", "window 0"]
    assert scene.workers[1].windows[1][1], "a retry"
    scene.load("a")
    assert scene.workers[2].contents == ["window 2", "window 4"]
    scene.look()
    assert scene.report.windows_begun_again == 2


def test_of_four_deaths_a_window_is_given_up_and_the_others_are_done(scene: Scene) -> None:
    scene.submit(4)
    for _ in range(4):
        assert 0 not in scene.finished
        at = next(i for i, w in enumerate(scene.workers) if "window 0" in w.contents and not w.is_killed)
        while scene.workers[at].contents[0] != "window 0":
            scene.reply(at)
        scene.reply(at, reason="no memory")
        scene.load("a")
    assert "4 workers died of the same window of texts (no memory); give them more memory" in str(scene.finished[0])
    reply_all(scene)
    assert all(isinstance(scene.finished[number], Done) for number in (1, 2, 3))


def reply_all(scene: Scene) -> None:
    """Have all workers do what they have."""
    while any(worker.windows and not worker.is_killed for worker in scene.workers):
        for number, worker in enumerate(scene.workers):
            if worker.windows and not worker.is_killed:
                scene.reply(number)


def test_a_window_that_lay_ready_behind_another_is_not_what_the_worker_died_of() -> None:
    scene = Scene(least=1, most=1)
    scene.load("a")
    scene.submit(2)
    for death in range(3):
        scene.lose(death)
        scene.load("a")
    assert scene.workers[3].contents == ["window 0", "window 1"]
    scene.reply(3)
    scene.lose(3)
    scene.load("a")
    scene.reply(4)
    assert all(isinstance(result, Done) for result in scene.finished.values()) and len(scene.finished) == 2


def test_a_node_that_is_gone_takes_its_workers_along(scene: Scene) -> None:
    scene.submit(1)
    scene.look([scene.nodes[1]])
    assert scene.workers[0].is_killed and "its node is gone" in scene.news
    assert scene.workers[1].contents == ["window 0"]
    scene.lose(0)
    assert len(scene.workers) == 3, "its loss is known already"


def test_a_node_that_drains_gets_no_more_windows_and_another_worker_is_started(scene: Scene) -> None:
    scene.submit(4)
    draining = [Node("a", 1, 0, 1, is_draining=True), scene.nodes[1], Node("c", 1, 0, 1)]
    scene.look(draining)
    scene.load("c")
    assert len(scene.workers) == 3
    scene.submit(1)
    assert scene.workers[2].contents == ["window 4"], "the worker there ends what it has"
    scene.reply(0)
    scene.reply(0)
    assert scene.workers[0].contents == [] and {0, 2} <= scene.finished.keys()
    scene.look([scene.nodes[1], Node("c", 1, 0, 1)])
    assert scene.workers[0].is_killed and len(scene.workers) == 3


def test_a_window_that_takes_long_is_given_to_another_worker_too(scene: Scene) -> None:
    scene.submit(2)
    scene.reply(1, seconds=20.0)
    for _ in range(39):
        scene.look()
        progress(scene, 0)
    assert scene.workers[1].contents == []
    scene.look()
    scene.look()
    assert scene.workers[1].contents == ["window 0"] and "late on host a" in scene.news
    scene.reply(1)
    assert isinstance(scene.finished[0], Done)
    scene.look()
    assert scene.workers[1].contents == [], "it is done"
    scene.reply(0)
    assert len([told for told in scene.told if isinstance(told, Finished)]) == 2, "the first result counts"


def progress(scene: Scene, worker: int) -> None:
    """A worker's answer, if it was asked how far it is."""
    if then := scene.workers[worker].then.pop("progress", None):
        then((1, int(scene.now), 0))
        scene.settle()


def test_a_worker_that_embeds_nothing_for_two_minutes_hangs_even_if_it_is_the_only_one() -> None:
    scene = Scene(least=1, most=1)
    scene.load("a")
    scene.submit(1)
    for number in range(2):
        for _ in range(60):
            scene.look()
        assert not scene.workers[number].is_killed
        scene.look()
        assert scene.workers[number].is_killed and "it embedded nothing for 120 s" in scene.news
        scene.load("a")
    assert "workers died of the same window" in str(scene.finished[0]) and scene.now < 500


def test_a_worker_that_goes_on_slowly_does_not_hang() -> None:
    scene = Scene(least=1, most=1)
    scene.load("a")
    scene.submit(1)
    for _ in range(1000):
        scene.look()
        progress(scene, 0)
    assert not scene.workers[0].is_killed and scene.over is None


def test_there_are_as_many_workers_as_the_windows_are_worth() -> None:
    scene = Scene(least=1, most=3, scales_down=True)
    scene.load("a")
    assert len(scene.workers) == 1
    scene.submit(3)
    assert len(scene.workers) == 2
    scene.submit(20)
    assert len(scene.workers) == 3
    scene.load("a", "b")
    reply_all(scene)
    scene.look(after=29)
    assert not any(worker.is_killed for worker in scene.workers)
    scene.look(after=2)
    assert [worker.is_killed for worker in scene.workers].count(True) == 2, "the least number stays"


def test_without_a_range_workers_stay() -> None:
    scene = Scene(least=1, most=3)
    scene.submit(20)
    scene.load("a", "a", "b")
    reply_all(scene)
    scene.look(after=1000)
    assert not any(worker.is_killed for worker in scene.workers)


def test_a_worker_that_dies_five_times_while_it_loads_ends_it_all() -> None:
    scene = Scene(least=1, most=1)
    for number in range(5):
        assert scene.over is None
        scene.workers[number].then.pop("place")(Place("a", "host a"))
        scene.settle()
        scene.lose(number)
    assert "was started 5 times and died each time while it loaded the model (it died)" in str(scene.over)


def test_workers_that_are_lost_with_a_node_while_they_load_count_once_and_end_nothing_while_another_works() -> None:
    scene = Scene(least=8, most=8)
    scene.load("a", "a")
    for worker in scene.workers[2:]:
        worker.then.pop("place")(Place("b", "host b"))
    scene.settle()
    for _ in range(6):
        scene.look([scene.nodes[0]])
        for worker in [worker for worker in scene.workers if "place" in worker.then]:
            worker.then.pop("place")(Place("b", "host b"))
        scene.settle()
    assert scene.over is None


def test_workers_that_found_no_room_are_withdrawn_before_those_that_work() -> None:
    scene = Scene(least=1, most=4, scales_down=True)
    scene.load("a")
    scene.submit(8)
    assert len(scene.workers) == 4
    reply_all(scene)
    scene.look(after=40)
    assert [worker.is_killed for worker in scene.workers] == [False, True, True, True]


def test_a_model_that_can_not_be_loaded_ends_it_all_and_may_be_loaded_later_where_another_worker_could() -> None:
    for is_loaded in (False, True):
        scene = Scene()
        if is_loaded:
            scene.load("a")
        worker = scene.workers[-1]
        worker.then.pop("place")(Place("b", "host b"))
        scene.settle()
        worker.then.pop("load")(ModelError("no memory (on host b)"))
        scene.settle()
        assert isinstance(scene.over, ModelError) and "(on host b)" in str(scene.over)
        assert scene.over.is_retryable == is_loaded


def test_without_room_it_ends_after_a_while() -> None:
    scene = Scene()
    scene.look(after=119)
    assert scene.over is None
    scene.look()
    assert isinstance(scene.over, SettingsError) and "no worker fits: a replica takes 1 CPUs" in str(scene.over)


def test_after_all_nodes_were_lost_others_are_waited_for(scene: Scene) -> None:
    scene.look(after=1000)
    scene.look([])
    scene.look([], after=117)
    assert scene.over is None
    scene.look([])
    assert scene.over is not None and scene.over.is_retryable
    assert "all workers were lost, and for 120 s no node has come for others" in str(scene.over)


def test_the_report_counts_time_while_any_worker_is_at_work(scene: Scene) -> None:
    scene.now += 5
    scene.submit(2)
    scene.now += 2
    scene.reply(0, seconds=2.0)
    scene.now += 3
    scene.reply(1, seconds=5.0)
    scene.look(after=10)
    report = scene.report
    assert report.tokens_per_second == 4.0, "20 tokens in 5 seconds"
    assert [worker.tokens_per_second for worker in report.workers] == [2.0, 5.0]
    assert [worker.busy_percent for worker in report.workers] == [25.0, 10.0]


def test_what_workers_warn_of_is_told(scene: Scene) -> None:
    scene.submit(1)
    _, _, then = scene.workers[0].windows.pop()
    then(Reply(Done("", EngineStats()), "", 1.0, INFO, ["host a: the budget was halved"]))
    scene.settle()
    assert "host a: the budget was halved" in scene.news


def test_stopping_ends_the_loop(scene: Scene) -> None:
    scene.submit(1)
    scene.supervisor.fail(STOP)
    scene.thread.join()
    assert scene.over is STOP


def test_what_ray_says_of_a_lost_worker_is_one_line() -> None:
    memory = RuntimeError("The actor died.\nOn how to address the out of memory issue: https://docs")
    assert reason_of_loss(memory) == "it took more memory than its node has, and Ray ended it"
    assert reason_of_loss(RuntimeError("\n the first one\nmany\nlines")) == "the first one"
    assert reason_of_loss(RuntimeError()) == "RuntimeError"

"""The pool alone, with workers that are names: who gets which plan, and which places are left."""

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pytest

from kvsharer_exp.search.execution.base import Done, Task
from kvsharer_exp.search.execution.pool import Lost, News, Pool, Ready
from kvsharer_exp.search.outcome import Bar, Outcome
from kvsharer_exp.values.plan import KVPlan

OUTCOME = Outcome({}, "complete", "fit", -1.0)


class FakeCrew:
    """Its workers are ready at once, but those of the places ``dead``, which are lost.

    Those of the places ``silent`` say nothing. ``given`` holds the tasks of each place.
    """

    def __init__(self, *, dead: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
        self.dead, self.silent = dead, silent
        self.given: dict[int, list[int]] = defaultdict(list)
        self.starts: list[int] = []
        self.now = 0.0
        self.said: deque[tuple[Any, News]] = deque()

    def start(self, number: int) -> list[int]:
        worker = [number]
        self.starts.append(number)
        if number not in self.silent:
            self.said.append((worker, Lost("no GPU") if number in self.dead else Ready()))
        return worker

    def send(self, worker: list[int], task: Task) -> None:
        self.given[worker[0]].append(task.number)
        self.said.append((worker, Done(task.number, OUTCOME, 1.0)))

    def stop(self, worker: list[int]) -> None:
        self.said = deque((other, news) for other, news in self.said if other is not worker)

    def news(self, seconds: float | None) -> list[tuple[Any, News]]:
        if self.said:
            return [self.said.popleft()]
        assert seconds is not None, "nobody will ever say anything"
        self.now += seconds
        return []


def task(number: int, text: str) -> Task:
    return Task(number, KVPlan.parse(text), Bar())


def pool(crew: FakeCrew, count: int, **more: Any) -> Pool:
    return Pool(crew, count, clock=lambda: crew.now, **more)


def until_ready(running: Pool, count: int) -> None:
    while running.room < count:
        running.wait()


def results(running: Pool, count: int) -> Iterator[int]:
    while count:
        for done in running.wait():
            count -= 1
            yield done.number


@pytest.fixture
def crew() -> FakeCrew:
    return FakeCrew()


@pytest.fixture
def running(crew: FakeCrew) -> Iterator[Pool]:
    """Two workers, each of which has scored a plan: worker 0 one with 1q4, worker 1 with 2q4."""
    with pool(crew, 2) as running:
        until_ready(running, 2)
        running.submit([task(0, "0_1q4_2_3_4"), task(1, "0_1_2q4_3_4")])
        list(results(running, 2))
        assert crew.given == {0: [0], 1: [1]}
        yield running


def test_a_plan_goes_to_the_worker_that_has_the_states_of_its_first_layers(
    crew: FakeCrew, running: Pool
) -> None:
    running.submit([task(2, "0_1_2q4_3q4_4"), task(3, "0_1q4_2_3_4q4")])
    list(results(running, 2))
    assert crew.given == {0: [0, 3], 1: [1, 2]}
    running.submit([task(4, "0_1_2q4_3q4_4q4")])  # the last of them was number 2
    list(results(running, 1))
    assert crew.given[1] == [1, 2, 4]


def test_a_new_worker_has_no_states(crew: FakeCrew, running: Pool) -> None:
    """Worker 1 is lost with a plan; what it had scored before says nothing of the new one."""
    running.submit([task(2, "0_1_2q4_3q4_4")])
    worker, _ = crew.said.pop()
    crew.said.append((worker, Lost("a fault")))
    assert running.wait() == []
    assert list(results(running, 1)) == [2]  # by worker 0, at once
    until_ready(running, 2)
    for number, text in ((3, "0_1q4_2_3_4q4"), (4, "0_1_2q4_3_4q4")):  # both begin with 0
        running.submit([task(number, text)])
        list(results(running, 1))
    assert crew.given == {0: [0, 2, 3, 4], 1: [1, 2]}


def test_a_place_where_nobody_starts_is_given_up_and_the_others_go_on() -> None:
    said: list[str] = []
    crew = FakeCrew(dead=(1,))
    with pool(crew, 3, say=said.append) as running:
        until_ready(running, 2)
        while crew.said:
            running.wait()
        assert len(running.workers) == 2
        running.submit([task(0, "0_1"), task(1, "0_x")])
        assert sorted(results(running, 2)) == [0, 1]
    assert crew.starts.count(1) == 3
    assert said.count("worker 1 does not start (no GPU): the sweep goes on with 2 of 3") == 1
    assert not any("worker 0" in line or "worker 2" in line for line in said)


def test_the_run_ends_where_no_place_is_left() -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError, match=r"^worker [01] does not start: no GPU$"):
        with pool(FakeCrew(dead=(0, 1)), 2, say=said.append) as running:
            while True:
                running.wait()
    assert sum("goes on with 1 of 2" in line for line in said) == 1


def test_a_worker_that_hangs_while_it_loads_is_replaced_and_then_given_up() -> None:
    said: list[str] = []
    crew = FakeCrew(silent=(0,))
    with pool(crew, 2, trial_timeout=5, start_timeout=60, say=said.append) as running:
        until_ready(running, 1)
        while len(running.workers) == 2:
            running.wait()
    assert crew.now == 180
    assert said == [
        "worker 0 is lost (not ready after 60 seconds): a new one is started",
        "worker 0 is lost (not ready after 60 seconds): a new one is started",
        "worker 0 does not start (not ready after 60 seconds): the sweep goes on with 1 of 2",
    ]


def test_workers_are_added_where_there_is_room_for_more_than_ever() -> None:
    """A place that was given up is no room: who starts there is lost again."""
    said: list[str] = []
    crew, room = FakeCrew(dead=(1,)), iter([2, 3, 2, 3, 4])
    with pool(crew, 2, may_have=lambda: next(room), say=said.append) as running:
        until_ready(running, 1)
        while crew.said:
            running.wait()
        counts = []
        for number in range(5):
            running.submit([task(number, "0_1")])
            list(results(running, 1))
            counts.append(len(running.workers))
        assert counts == [1, 2, 2, 2, 3]
        until_ready(running, 3)
    assert crew.starts == [0, 1, 1, 1, 2, 3]
    assert said[-2:] == [f"there is room for worker {n}: it is started" for n in (2, 3)]

"""The line that a sweep shows on a terminal while it searches."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.steps.sweep_progress import SweepProgress
from kvsharer_exp.cli.steps.sweep_setup import say_short_screens
from kvsharer_exp.search.execution.base import Worker
from kvsharer_exp.search.front import num_shared
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.trial import TrialResult

SCORED = TrialResult(
    *(0, {}, KVPlan.parse("0_1q4_x"), {"kl": 0.25}, Footprint(1, 0.4, 0), "complete", "all", 1.0),
    score=-0.25,
)


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> Any:
    study = SimpleNamespace(n_trials=40, minutes=None, patience=None)
    kind = SimpleNamespace(kind="layer_actions")
    config = SimpleNamespace(
        **{"study": study, "search_space": kind, "quiet": False, "search_minutes": 3.0},
        scoring=SimpleNamespace(fitness_label="kl"),
        compression=SimpleNamespace(ratios=[0.34, 0.67]),
    )
    log = SimpleNamespace(console=Console(width=120), seconds=0.0)
    store = SimpleNamespace(results=list)
    busy = Worker("busy", "0_1q4_x", 1.0)
    executor = SimpleNamespace(workers=(busy, busy, Worker("free")))
    made = SweepProgress(config, log, store, (1.0, -2.0), executor)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_keep", lambda *_: None)
    log.say = lambda line: None
    made.log = log
    return made


def test_it_names_rate_workers_failures_and_what_is_left(progress) -> None:
    lost = replace(SCORED, status="failed", score=None, reason="RuntimeError: out of memory")
    beaten = replace(SCORED, status="screened_out", score=None, reason="beaten")
    for number, result in enumerate((SCORED, lost, beaten, lost, replace(lost, reason="NaN"))):
        progress.log.seconds += 12.0
        progress.add(replace(result, number=number))
    (task,) = progress._bar.tasks
    assert task.fields["state"] == (
        "best KL 0.25 at 40% of KV · hypervolume 1.050 · 1 screened out · 2 × RuntimeError: out of "
        "me… · 1 × NaN · 5.0/min · 2/3 workers busy · 2 min"
    )


def test_it_says_of_what_the_best_losses_are(progress) -> None:
    """They stood there as ``26: 0.25``, which nobody explained."""
    progress.log.seconds += 1.0
    progress.add(SCORED)
    progress.add(replace(SCORED, score=-0.01, footprint=Footprint(1, 0.75, 0)))
    assert progress._losses() == ["best KL 0.25 at 40%, 0.01 at 75% of KV"]
    progress._config.scoring.fitness_label = "cosine"
    assert progress._losses() == ["best loss 0.25 at 40%, 0.01 at 75% of KV"]


def test_of_maps_it_says_how_many_layers_are_shared(progress) -> None:
    progress.log.seconds += 1.0
    progress._of_plans, progress._best.rung = False, num_shared
    for text, score in (("0_0_2", -0.5), ("0_0_0", -2.0)):
        progress.add(replace(SCORED, plan=KVPlan.parse(text), score=score))
    assert progress._losses() == ["best KL 0.5 at 1, 2 at 2 shared layers"]


@pytest.mark.parametrize(("windows", "left_out"), [(24, []), (8, ["8"]), (2, ["2, 8"])])
def test_screens_of_as_many_windows_as_there_are_are_named(
    windows: int, left_out: list[str]
) -> None:
    said: list[str] = []
    log: Any = SimpleNamespace(say=said.append)
    say_short_screens(Config(command="sweep"), log, windows)
    assert said == [
        f"left out of study.screen_windows: {those}, for there are {windows} scoring windows"
        for those in left_out
    ]

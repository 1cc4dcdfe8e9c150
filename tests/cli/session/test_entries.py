"""The entries of a front: what cannot be scored on the report has its search scores, and why."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.steps.sweep_entries import EntryMaker
from kvsharer_exp.measure.held_out import HeldOutScores
from kvsharer_exp.search.execution.base import DeviceLostError
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.trial import TrialResult

FULL = KVPlan.full(4)
GOOD, BAD = KVPlan.parse("0_0_2_3"), KVPlan.parse("0_1_0_3")
PPL = "perplexity/heldout"


@pytest.fixture
def entries() -> Any:
    """Makes entries with a scorer that raises the error it is given for one plan."""
    said: list[str] = []

    def make(error: Exception) -> tuple[EntryMaker, list[str]]:
        def score(plan: Any) -> HeldOutScores:
            if getattr(plan, "plan", plan) == BAD:
                raise error
            return HeldOutScores({PPL: 9.0}, {}, {})

        full = CandidateScores((1.0,), (0.0,), (2.0,))
        scorers: Any = SimpleNamespace(
            held_out=lambda: SimpleNamespace(score=score),
            fitness=SimpleNamespace(num_windows=1, full_scores=full),
            directions={},
            pass_marks={},
        )
        store: Any = SimpleNamespace(
            held_out=lambda key: {}, keep_held_out=lambda *_: None, map_run=lambda plan: ""
        )
        log: Any = SimpleNamespace(say=said.append)
        loaded: Any = SimpleNamespace(full_cache=FULL)
        return EntryMaker(Config(command="sweep"), log, loaded, scorers, store, {}), said

    return make


def result(plan: KVPlan) -> TrialResult:
    scores = {"kl": 0.5, "cosine": 0.9}
    return TrialResult(1, {}, plan, scores, Footprint(1, 0.5, 0), "complete", "fit", 0.0, -0.5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (NotFiniteError("NaN in window 0"), "NotFiniteError: NaN in window 0"),
    ],
    ids=["memory", "overflow"],
)
def test_a_plan_that_fails_on_the_report_keeps_its_search_scores(
    entries, error: Exception, reason: str
) -> None:
    """Memory that ran out ended the sweep."""
    maker, said = entries(error)
    assert PPL in maker.make(result(GOOD)).scores
    assert set(maker.make(result(BAD)).scores) == {"kl", "cosine"}
    assert f"{BAD} has no report scores ({reason})" in said


def test_a_device_that_is_lost_ends_the_run(entries) -> None:
    maker, _ = entries(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceLostError, match="only a new process"):
        maker.make(result(BAD))

"""The stages: who is stopped, what the score is made of, how far cheap and dear stages agree."""

import math
import random
from dataclasses import replace
from statistics import variance

import pytest
import torch

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.search.bars import Bars
from kvsharer_exp.search.execution.base import Task, attempt
from kvsharer_exp.search.outcome import FIT, Bar, Outcome, screen, screens
from kvsharer_exp.search.stages import StagedScorer, agreements
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult
from tests.tiny import NUM_LAYERS, room_for, tiny_model

WINDOWS = torch.randint(100, (6, 8), generator=torch.Generator().manual_seed(0))
IDENTITY = SharingMap.identity(NUM_LAYERS)
MAPS = [IDENTITY.share(t, s) for t in range(1, NUM_LAYERS) for s in range(t)]


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(tiny_model("llama"), WINDOWS, batch_size=2)


def scorer(evaluator: Evaluator, **more) -> StagedScorer:
    return StagedScorer(
        tiny_model("llama"), evaluator, **({"fitness": {"kl": 1.0}, "screen_windows": [2]} | more)
    )


def bar_of(results: list[TrialResult]) -> Bar:
    """What a map that keeps half of the KV has to beat on the first two windows."""
    return Bars([2], 0.1, results).of(0.5)


def result(
    number: int, first: float, fit: float, score: float | None = None, kv: float = 0.5
) -> TrialResult:
    score = -fit if score is None else score
    scores = {screen(2): first, FIT: fit}
    size = Footprint(1, kv, 0)
    return TrialResult(number, {}, MAPS[0], scores, size, "complete", "fit", 0.0, score)


def test_each_fitness_is_minus_its_loss_and_weights_add_them(evaluator: Evaluator) -> None:
    shared = MAPS[-1]
    measured, full = evaluator.score(shared), evaluator.full_scores
    more_nll = math.log(measured.perplexity) - math.log(full.perplexity)
    expected = {"kl": measured.kl, "cosine": 1 - measured.cosine, "perplexity": max(0, more_nll)}
    for name, loss in expected.items():
        outcome = scorer(evaluator, fitness={name: 1.0})(shared, Bar())
        assert outcome.score == pytest.approx(-loss, abs=1e-9)
    both = scorer(evaluator, fitness={"kl": 2.0, "cosine": 0.5})
    assert both(shared, Bar()).score == pytest.approx(
        -2 * expected["kl"] - 0.5 * expected["cosine"]
    )
    assert both.reference_score == -4.5
    assert outcome.scores["kl/variance"] == pytest.approx(variance(measured.kls))


def test_a_map_beaten_on_the_first_windows_stops_there(evaluator: Evaluator) -> None:
    shared = MAPS[-1]
    first = evaluator.score(shared, windows=slice(0, 2)).kl
    stopped = scorer(evaluator)(shared, bar_of([result(0, first / 2, first / 2)]))
    assert (stopped.status, stopped.stage_reached, stopped.score) == (
        "screened_out",
        "screen/2",
        None,
    )
    assert f"{first:.3g} on the first 2 windows" in stopped.reason
    # One that keeps more KV is no rival, one within the margin does not stop it, and of several
    # the best in the end counts, not the luckiest at first.
    lucky = [result(0, first / 2, 2.0), result(1, first, 1.0)]
    for rivals in ([result(0, first / 2, 1.0, kv=0.9)], [result(0, first / 1.05, 1.0)], lucky):
        assert scorer(evaluator)(shared, bar_of(rivals)).status == "complete"


def test_the_margin_is_learned_from_how_maps_differ_over_windows() -> None:
    dice = random.Random(0)

    def learned(maps: int, deviation: float, windows: int) -> float:
        """From maps that lose about 0.2, and more or less so on each of 24 windows."""
        each = [[0.2 + dice.gauss(0, deviation) for _ in range(24)] for _ in range(maps)]
        found = [replace(result(i, 0, 0), window_losses=tuple(w)) for i, w in enumerate(each)]
        odd = [replace(result(i, 0, 0), window_losses=(5.0 * i,) * 24) for i in range(1, 9)]
        return Bars([windows], results=found + odd).margins[screen(windows)]

    assert learned(30, 0.0, 2) == 0
    expected = 3 * math.sqrt(2) * 0.02 / 0.2  # two maps, relative to what they lose
    assert learned(190, 0.02, 2) == pytest.approx(expected * math.sqrt(1 / 2 - 1 / 24), rel=0.1)
    assert learned(190, 0.02, 8) == pytest.approx(expected * math.sqrt(1 / 8 - 1 / 24), rel=0.1)
    assert learned(1, 0.02, 2) == 0.25  # too few to learn from


def test_agreement_is_kendalls_tau_between_the_stages() -> None:
    same = [result(i, 0.1 * i, 0.2 * i) for i in range(1, 6)]
    assert [a.to_dict() for a in agreements(same, {"kl": 1.0})] == [
        {"cheap": "screen/2", "dear": "fit", "maps": 5, "kendall_tau": 1.0}
    ]
    tasks = [result(i, 0.1 * i, 0.2 * i, score=-1 + 0.1 * i) for i in range(1, 6)]
    first, fit = agreements(tasks, {"kl": 1.0, "lm_eval": 1.0})
    assert (first.kendall_tau, fit.dear, fit.kendall_tau) == (1.0, "tasks", -1.0)
    assert agreements(same[:2], {"kl": 1.0})[0].kendall_tau is None


def test_an_unknown_fitness_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(InputError, match=r"scoring\.fitness=klx is unknown: did you mean kl"):
        scorer(evaluator, fitness={"klx": 1.0})
    with pytest.raises(InputError, match="needs tasks"):
        scorer(evaluator, fitness={"lm_eval": 1.0})


def test_every_stage_sees_more_windows_and_may_stop_a_map(evaluator: Evaluator) -> None:
    shared, size = MAPS[-1], Footprint(1, 0.5, 0)
    staged = scorer(evaluator, screen_windows=[2, 4, 6])  # of six windows
    losses = {n: evaluator.score(shared, windows=slice(0, n)).kl for n in (2, 4, 6)}
    complete = staged(shared, Bar())
    assert {name: complete.scores[name] for name in screens(complete.scores)} == {
        screen(2): losses[2],
        screen(4): losses[4],
    }
    assert complete.scores[FIT] == pytest.approx(losses[6])
    assert complete.window_losses == pytest.approx(evaluator.score(shared).kls)
    rival = TrialResult(
        0, {}, MAPS[0], {screen(2): losses[2], screen(4): losses[4] / 2, FIT: 0.0}, size,
        "complete", "fit", 0.0, 0.0,
    )  # fmt: skip
    bars = Bars(staged.screens, 0.1, [rival])
    stopped = staged(shared, bars.of(0.5))
    assert (stopped.status, stopped.stage_reached) == ("screened_out", "screen/4")
    assert FIT not in stopped.scores
    assert bars.margins == {screen(2): 0.1, screen(4): 0.1}
    results = [replace(rival, number=n, scores=dict(complete.scores)) for n in range(3)]
    pairs = [(a.cheap, a.dear, a.maps) for a in agreements(results, {"kl": 1.0})]
    assert pairs == [("screen/2", "screen/4", 3), ("screen/4", "fit", 3)]


def test_maps_looked_ahead_at_score_as_without_in_fewer_forwards() -> None:
    forwards = []
    model = tiny_model("llama")

    def outcomes(ahead: bool) -> list[Outcome]:
        staged = scorer(Evaluator(model, WINDOWS, batch_size=2), screen_windows=[2, 4], together=3)
        handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: forwards.append(ahead))
        if ahead:
            staged.look_ahead(MAPS[:3])
        found = [staged(sharing_map, Bar()) for sharing_map in MAPS[:4]]
        handle.remove()
        return found

    for one, other in zip(outcomes(True), outcomes(False), strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-4, abs=1e-6)
        assert one.window_losses == pytest.approx(other.window_losses, rel=1e-4, abs=1e-6)
    assert forwards.count(False) - forwards.count(True) == 2


@pytest.mark.parametrize(("most", "then", "said"), [(4, [4, 4], 2), (2, [], 1)])
def test_maps_that_do_not_fit_together_are_scored_in_fewer_from_then_on(
    most: int, then: list[int], said: int, caplog
) -> None:
    """There are two windows of each map in the first stage."""
    model = tiny_model("llama")
    staged = scorer(Evaluator(model, WINDOWS, batch_size=2), together=4)
    expected = [staged(m, Bar()).score for m in MAPS[:4]]
    with room_for(model, most) as tried:
        staged.look_ahead(MAPS[:4])
        assert tried[0] == 8
        line = f"memory ran out: scoring.maps_per_forward is {said} from here on"
        assert caplog.records[-1].getMessage() == line
        tried.clear()
        staged.look_ahead(MAPS[:4])
        assert tried == then  # what does not fit is not tried again
        assert [staged(m, Bar()).score for m in MAPS[:4]] == pytest.approx(expected, rel=1e-4)


def test_other_faults_of_looking_ahead_are_told(evaluator: Evaluator, monkeypatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("a kernel refuses")

    staged = scorer(evaluator, together=3)
    monkeypatch.setattr(evaluator, "score_together", fault)
    with pytest.raises(RuntimeError, match="a kernel refuses"):
        staged.look_ahead(MAPS[:3])


@pytest.mark.parametrize("most", [1, 0])
def test_memory_that_runs_out_makes_batches_smaller_and_then_fails(most: int) -> None:
    model = tiny_model("llama")
    staged = scorer(Evaluator(model, WINDOWS, batch_size=4), screen_windows=[])
    expected = staged(MAPS[-1], Bar())
    with room_for(model, most) as tried:
        if most:
            outcome = staged(MAPS[-1], Bar())
            assert outcome.score == pytest.approx(expected.score, rel=1e-4)
            assert outcome.window_losses == pytest.approx(
                expected.window_losses, rel=1e-3, abs=1e-6
            )
            assert sorted(set(tried), reverse=True) == [4, 2, 1]
            tried.clear()
            staged(MAPS[0], Bar())
            assert set(tried) == {1}
        else:
            done = attempt(staged, Task(0, KVPlan.of(MAPS[-1]), Bar()))
            assert done.outcome.status == "failed"
            assert done.outcome.reason.startswith("OutOfMemoryError: CUDA out of memory")

"""The evaluator on a GPU: several plans in one forward, resumed, and the numbers of the CPU."""

import pytest
import torch

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.values.plan import KVPlan
from tests.gpu.models import CLOSE, PLANS, apart, llama_on, plan
from tests.tiny import tokens

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize(
    "dtype", CLOSE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@DTYPES
@pytest.mark.parametrize("maps_per_forward", [2, 4, 8])
def test_plans_in_one_forward_score_as_each_alone(dtype, maps_per_forward: int, device) -> None:
    """What ``scoring.maps_per_forward`` does. Larger products may add up in another order."""
    model, windows = llama_on(device, dtype), tokens(4, 24)
    plans = [plan(name) for name in [*PLANS, *PLANS][:maps_per_forward]]
    alone = [Evaluator(model, windows).score(one) for one in plans]
    together = Evaluator(model, windows).score_together(plans)
    for mine, other in zip(alone, together, strict=True):
        for name in ("cosines", "kls", "nlls"):
            expected, got = (torch.tensor(getattr(one, name)) for one in (mine, other))
            assert apart(got, expected) < 3 * CLOSE[dtype], name


@DTYPES
def test_scores_are_those_of_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    windows, close = tokens(4, 24), {torch.float32: 1e-3}.get(dtype, 0.25)
    exact = Evaluator(llama_on(torch.device("cpu"), torch.float64), windows)
    evaluator = Evaluator(llama_on(device, dtype), windows)
    assert evaluator.full_scores.kl < 1e-3
    for name in ("share", "drop", "constant", "affine"):
        expected = exact.score(plan(name)).kl
        assert evaluator.score(plan(name)).kl == pytest.approx(expected, rel=close), name


@DTYPES
def test_resumed_is_plain(dtype: torch.dtype, device: torch.device) -> None:
    """A plan that starts from kept states of the device has the scores of one that does not."""
    model, windows = llama_on(device, dtype), tokens(4, 24)
    first, then = KVPlan.parse("0_1_2_0_4_5"), KVPlan.parse("0_1_2_0_4_1")
    resumed = Evaluator(model, windows)
    resumed.score(first)
    before = resumed.layers_run
    got = resumed.score(then).kl
    assert resumed.layers_run - before == 1
    assert got == pytest.approx(Evaluator(model, windows).score(then).kl, rel=3 * CLOSE[dtype])

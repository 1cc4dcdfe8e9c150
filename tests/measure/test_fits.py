"""Stand-ins fitted in closed form: how good, where they are put, one after the other, saved."""

import pytest
import torch

from kvsharer_exp.measure.action_errors import action_errors
from kvsharer_exp.measure.calibration import block_errors
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.fits import fit_actions, fit_plan
from kvsharer_exp.model.sharing.architectures import SharingError
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from tests.tiny import NUM_LAYERS, tiny_model, tokens

WINDOWS, OTHER = tokens(32, 24, seed=3), tokens(8, 24, seed=4)
BOTH = {layer: [Constant(), Affine()] for layer in range(NUM_LAYERS)}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi", "gpt2"])
def test_an_affine_is_better_than_a_constant_is_better_than_nothing(name: str) -> None:
    model = tiny_model(name)
    fits = fit_actions(model, WINDOWS, BOTH)
    candidates = {
        layer: [(Drop(), None), *((action, fits[layer, action]) for action in BOTH[layer])]
        for layer in BOTH
    }
    errors = torch.tensor(list(action_errors(model, OTHER, candidates).values())).mean(0)
    assert errors[2] < errors[1] < errors[0]


def test_the_error_of_a_read_is_that_of_its_pair_and_of_own_nothing() -> None:
    model = tiny_model("gemma3_text")
    pairs = block_errors(model, OTHER)
    candidates = {
        4: [(Read(0), None), (Own(), None), (Own(8, 8), None), (Own(2, 8), None)],
        3: [(Read(1), None)],
    }
    found = action_errors(model, OTHER, candidates)
    assert found[4][0] == pytest.approx(pairs[4][0])
    assert found[3][0] == pytest.approx(pairs[3][1])
    assert found[4][1] == 0 < found[4][2] < found[4][3]


def test_a_norm_is_replaced_where_that_is_better() -> None:
    model = tiny_model("gemma2")
    fits = fit_actions(model, WINDOWS, {layer: [Affine()] for layer in range(NUM_LAYERS)})
    chosen = {layer: fit for (layer, _), fit in fits.items()}
    assert "post_attention_layernorm" in {fit.norm for fit in chosen.values()}
    held = WINDOWS[-8:]
    errors = action_errors(model, held, {i: [(Affine(), fit)] for i, fit in chosen.items()})
    assert {i: [fit.error] for i, fit in chosen.items()} == errors
    plain = fit_actions(tiny_model("llama"), WINDOWS, {1: [Affine()]})
    assert plain[1, Affine()].norm is None


def test_a_fitted_plan_runs_and_one_after_the_other_differs_after_the_first() -> None:
    model = tiny_model("llama")
    plan = KVPlan.parse("0_a_2_a_c_5")
    together = fit_plan(model, plan, WINDOWS)
    ordered = fit_plan(model, plan, WINDOWS, sequential=True)
    passes = fit_plan(model, plan, WINDOWS, memory_bytes=1)
    assert together.keys == passes.keys
    assert together.fits[1].fingerprint == ordered.fits[1].fingerprint
    assert together.fits[3].fingerprint != ordered.fits[3].fingerprint
    scores = [Evaluator(model, OTHER).score(p).kls for p in (together, ordered)]
    assert scores[0] != scores[1]


def test_the_same_text_gives_the_same_fits() -> None:
    model = tiny_model("llama")
    one, two = (fit_plan(model, KVPlan.parse("0_a_2_c_4_5"), WINDOWS) for _ in range(2))
    assert one.keys == two.keys
    assert one.keys != fit_plan(model, one.plan, OTHER).keys


def test_what_cannot_be_fitted_or_run_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(SharingError, match="plan has 3 layers but the model has 6"):
        fit_plan(model, KVPlan.parse("0_a_2"), WINDOWS)
    with pytest.raises(InputError, match="give at least 2"):
        fit_plan(model, KVPlan.parse("0_a_2_3_4_5"), WINDOWS[:1])
    with pytest.raises(InputError, match=r"layer 1 has the stand-in a.*fit_plan"):
        with apply_plan(model, KVPlan.parse("0_a_2_3_4_5")):
            raise AssertionError

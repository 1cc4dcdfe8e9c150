"""The contract of keeps that choose when a prompt has ended, over architectures × plans."""

import copy
import re
from functools import partial

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.model.actions.own import OwnRunner
from kvsharer_exp.model.actions.sizes import kv_bytes
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.permanent import make_plan
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.sharing.queries import ObservedConfig
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.registry import read_keep
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.plan import KVPlan
from tests.model.actions.plans import fitted
from tests.model.actions.test_plan_contract import _held, check_scores_together, stepwise
from tests.tiny import contract_architectures, hooks, tiny_model, tokens

END = 12
# Layers 1, 3 and 5 see all tokens in every architecture but mistral; 0, 2 and 4 slide in some.
PLANS = {
    "snap": "0_1snap6+2_2_3snap0.5+3_0_1",
    "heavy": "0_1h7_2_1_4_5h0.5",
    "quantised snap": "0q4g8_1q4g8snap9+2_0_1_4_5q8g8snap0.25+1",
    "quantised heavy": "0_1q8g8h9_0_1_4_5q4h6",
    "mixture": "a_1q4g8snap8+3_x_3h5_4w2+5_3",
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


# Sliding layers, fused projections, partial rotation and norms of queries.
@pytest.fixture(params=contract_architectures(("llama", "gemma3_text", "qwen3", "gpt_neox")))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    found = tiny_model(request.param)
    if attention_layers(found)[1].window is not None:
        pytest.skip("all its layers slide")
    return found


@pytest.fixture(params=PLANS, ids=lambda name: name.replace(" ", "-"))
def plan(request: pytest.FixtureRequest, model: PreTrainedModel) -> FittedPlan:
    return fitted(model, PLANS[request.param])


def test_steps_chunks_rows_and_no_cache_give_the_same(model, plan) -> None:
    ids = tokens(length=21)
    close = 1e-5 if model.dtype == torch.float64 else 5e-4  # Gemma 2 rounds codes in float32
    stock = model(ids).logits
    before, configs = hooks(model), [m.attention.config for m in attention_layers(model)]
    with apply_plan(model, plan):
        steps = stepwise(model, ids, [END, *[1] * 9])
        parts = stepwise(model, ids, [END, 4, 5])
        padded, alone = left_padded(model)
    with apply_plan(model, plan, prompt=END):
        ways = {
            "no cache": model(ids, use_cache=False).logits,
            "cached": model(ids, use_cache=True).logits,
            "parts": parts,
            "a prompt in chunks": stepwise(model, ids, [5, 3, 8, 4, 1]),
        }
    assert (steps - stock)[:, END:].abs().max() > 1e-3
    for name, logits in ways.items():
        assert (logits - steps).abs().max() < close, name
    assert (padded - alone).abs().max() < close
    assert hooks(model) == before
    assert [m.attention.config for m in attention_layers(model)] == configs
    assert torch.equal(model(ids).logits, stock)


def left_padded(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The last logits of rows with prompts of several lengths: in one batch, and alone."""
    rows = [tokens(1, length, seed=length) for length in (21, 17, 13)]
    pads = [21 - row.shape[1] for row in rows]
    batch = torch.cat([torch.nn.functional.pad(r, (p, 0)) for r, p in zip(rows, pads, strict=True)])
    mask = torch.arange(21) >= torch.tensor(pads)[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, together = DynamicCache(config=model.config), []
    for part in (slice(0, END), slice(END, 18), slice(18, 21)):
        known = {"attention_mask": mask[:, : part.stop].long(), "position_ids": positions[:, part]}
        together.append(model(batch[:, part], past_key_values=cache, **known).logits)
    logits = torch.cat(together, 1)
    alone = [stepwise(model, row, [END - pad, 9])[0] for row, pad in zip(rows, pads, strict=True)]
    return torch.cat([row[-len(a) :] for row, a in zip(logits, alone, strict=True)]), torch.cat(
        alone
    )


def test_generate_is_the_same_token_by_token(model, plan) -> None:
    """Greedy and by beams, with a padded row, against steps by hand."""
    ids = tokens(length=END)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    with apply_plan(model, plan):
        found = model.generate(ids, **options)
        beams = model.generate(ids, num_beams=3, **options)
        alone = model.generate(ids[:1], num_beams=3, max_new_tokens=8, do_sample=False)
        step, cache = ids, DynamicCache(config=model.config)
        for _ in range(8):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            known = {"attention_mask": mask, "position_ids": positions}
            step = model(step, past_key_values=cache, **known).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, step], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    ended = (found == 2).cumsum(1) > 0  # `generate` pads what follows the end
    assert torch.equal(found[~ended], ids[:, : found.shape[1]][~ended])
    length = alone.shape[1]
    assert torch.equal(beams[:1, :length], alone)


def test_the_cache_holds_exactly_the_predicted_bytes(model, plan) -> None:
    layers, ids = attention_layers(model), tokens(length=27)
    size = next(model.parameters()).dtype.itemsize
    with apply_plan(model, plan):
        for prompt in (3, 9, 16):
            cache = DynamicCache(config=model.config)
            steps = [(0, prompt), *((n, n + 1) for n in range(prompt, 22)), (22, 27)]
            for first, last in steps:
                model(ids[:, first:last], past_key_values=cache)
                predicted = kv_bytes(plan.plan, layers, last, size, prompt) * len(ids)
                assert cache_bytes(cache) == predicted, (prompt, last)
    held = [layer for layer in cache.layers if isinstance(layer, Store)]
    inner = [getattr(layer, "_held", None) for layer in held]
    every = [*held, *(layer for layer in inner if layer is not None)]
    assert sum(map(_held, every)) == sum(t.nbytes for layer in held for t in layer.tensors)
    assert footprint(model, plan.plan, context=27).kv_bytes == kv_bytes(plan.plan, layers, 27, size)


def test_for_good_is_the_same(model, plan) -> None:
    ids = tokens(length=18)
    with apply_plan(model, plan):
        expected = stepwise(model, ids, [END, 1, 1, 1, 3])
    own = make_plan(copy.deepcopy(model), plan)
    assert torch.equal(stepwise(own, ids, [END, 1, 1, 1, 3]), expected)
    other = copy.deepcopy(own)
    assert torch.equal(stepwise(other, ids, [END, 1, 1, 1, 3]), expected)
    assert not set(map(id, exchanges(other))) & set(map(id, exchanges(own)))


def exchanges(model: PreTrainedModel) -> list[object]:
    """Where the attentions whose queries are watched find their views."""
    configs = [m.config for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    found = [c.exchange for c in configs if isinstance(c, ObservedConfig)]
    assert found
    return found


@pytest.mark.parametrize("keep", [SnapKV(12, 4), H2O(21)], ids=str)
def test_a_keep_that_lets_nothing_go_is_the_full_cache_to_the_bit(model, keep) -> None:
    ids, cut = tokens(length=20), [END, 1, 1, 2, 4]
    plan = KVPlan(
        tuple(Own(keep=keep) if a.window is None else Own() for a in attention_layers(model))
    )
    stock, stepped = model(ids).logits, stepwise(model, ids, cut)
    with apply_plan(model, plan):
        assert torch.equal(stepwise(model, ids, cut), stepped)
    with apply_plan(model, plan, prompt=END):
        assert torch.equal(model(ids, use_cache=False).logits, stock)


def test_plans_together_score_as_each_alone(model) -> None:
    windows = tokens(4, 20)
    plans = [fitted(model, text, seed) for seed, text in enumerate(PLANS.values())]
    check_scores_together(partial(Evaluator, model, windows, prompt=END), plans)


def test_an_attention_that_hides_its_queries_is_refused(monkeypatch) -> None:
    """Else nothing would ever be let go, and the plan would look lossless."""
    monkeypatch.setattr(ObservedConfig, "_attn_implementation", "sdpa")  # it calls its function
    model = tiny_model("llama")
    with (
        apply_plan(model, KVPlan.parse("0_1h5_2_3_4_5")),
        pytest.raises(SharingError, match=r"layer 1 .* showed its queries to nobody"),
    ):
        model(tokens())


def test_refusals_name_the_layer_and_a_way_out() -> None:
    llama, sliding = tiny_model("llama"), tiny_model("mistral")
    with (
        apply_plan(llama, KVPlan.parse("0_1h7_2_3_4_5")),
        pytest.raises(SharingError, match=r"h7.*prompt.*scoring=long"),
    ):
        llama(tokens(), use_cache=False)
    for text in ("0_1h5_2_3_4_5", "0_1snap4+2_2_3_4_5"):
        with (
            pytest.raises(SharingError, match=r"layer 1 .*window of 8 tokens.*w2\+4"),
            apply_plan(sliding, KVPlan.parse(text)),
        ):
            pass
    with apply_plan(sliding, KVPlan.parse("0_1w2+4_2_3_4_5")):  # what the refusal offers
        sliding(tokens())


@pytest.mark.parametrize("window", [2, 3, 8, 60, 64, 4096])
def test_the_window_that_a_refusal_offers_is_taken(window: int) -> None:
    model = tiny_model("mistral", sliding_window=window)
    layers = attention_layers(model)
    with pytest.raises(SharingError) as refused:
        OwnRunner(Own(keep=H2O(5))).check(layers[1], layers)
    offered = re.search(r"like (\S+),", str(refused.value))
    assert offered is not None
    keep = read_keep(offered[1])
    assert keep is not None
    OwnRunner(Own(keep=keep)).check(layers[1], layers)
    assert keep.held(window - 1) < window - 1

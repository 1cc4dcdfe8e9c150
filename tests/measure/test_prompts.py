"""Scores of what follows a prompt are those of a prefill and a decode with a cache."""

import math
from statistics import fmean

import pytest
import torch
from transformers import DynamicCache

from kvsharer_exp.measure.action_errors import action_errors
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.held_out import HeldOutScorer
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY
from tests.tiny import NUM_LAYERS, tiny_model, tokens

PROMPT = 14
WINDOWS = tokens(3, 22)
PLANS = ["0_1snap5+2_0_3_4_5h4", "0h6_1q8g8h9_2_x_0_1", "0q4g8_1w2+5_2q4g8snap8+3_3_4_5"]


def decoded(model, plan: KVPlan) -> torch.Tensor:
    """The logits after a prefill of the prompt, token by token: (windows, tokens, vocabulary)."""
    found = []
    with torch.inference_mode(), apply_plan(model, plan):
        for window in WINDOWS:
            cache = DynamicCache(config=model.config)
            model(window[None, :PROMPT], past_key_values=cache)
            steps = [model(t.view(1, 1), past_key_values=cache).logits[0] for t in window[PROMPT:]]
            found.append(torch.cat(steps))
    return torch.stack(found).log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("text", PLANS)
def test_scores_are_those_of_a_prefill_and_a_decode(kind: str, text: str) -> None:
    model, plan = tiny_model(kind), KVPlan.parse(text)
    p, q = decoded(model, KVPlan.full(NUM_LAYERS)), decoded(model, plan)
    kls = (p.exp() * (p - q)).sum(-1).mean(-1)
    nlls = -q[:, :-1].gather(-1, WINDOWS[:, PROMPT + 1 :, None]).mean((1, 2))
    for budget in (0, 1 << 30):
        evaluator = Evaluator(model, WINDOWS, prompt=PROMPT, batch_size=2, memory_budget=budget)
        scores = evaluator.score(plan)
        assert scores.kls == pytest.approx(kls.tolist(), rel=1e-4, abs=1e-7)
        assert scores.nlls == pytest.approx(nlls.tolist(), rel=1e-6)
    held_out = HeldOutScorer(model, WINDOWS, None, batch_size=2, prompt=PROMPT)
    expected = math.exp(fmean(nlls.tolist()))
    assert held_out.score(plan).scores[HELD_OUT_PERPLEXITY] == pytest.approx(expected, rel=1e-6)


def test_the_states_of_a_prefix_serve_here_too() -> None:
    """What the first layers gave of prompt and continuation is not computed again."""
    model = tiny_model("llama")
    evaluator = Evaluator(model, WINDOWS, prompt=PROMPT)
    evaluator.score(KVPlan.parse("0_1h5_2_3_4_5"))
    before = evaluator.layers_run
    for text in ("0_1h5_2_3_1_5", "0_1h5_2_3_1_5snap5+2", "0_1h5_2_3_1_5"):
        resumed = evaluator.score(KVPlan.parse(text))
        plain = Evaluator(model, WINDOWS, prompt=PROMPT, memory_budget=0).score(KVPlan.parse(text))
        assert resumed.kls == pytest.approx(plain.kls, rel=1e-6, abs=1e-9)
    assert evaluator.layers_run - before == 2 + 1 + 0


def test_a_keep_that_never_lets_go_has_no_block_error() -> None:
    """And the less it holds, the more it changes its block after the prompt, and only there."""
    model, actions = tiny_model("llama"), [*map(H2O, (3, 6, 21)), SnapKV(4, 2), SnapKV(14, 2)]
    asked: dict[int, list[tuple[Action, None]]] = {2: [(Own(keep=keep), None) for keep in actions]}
    few, some, all_, snap, whole = action_errors(model, WINDOWS, asked, prompt=PROMPT)[2]
    assert few > some > all_ == whole == 0 < snap
    block, seen = attention_layers(model)[2].block, []
    handle = block.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.inference_mode():
        model(WINDOWS, use_cache=False)
        with apply_plan(model, KVPlan.full(NUM_LAYERS).replace(2, asked[2][0][0]), prompt=PROMPT):
            model(WINDOWS, use_cache=False)
    handle.remove()
    own, changed = (o[0] if isinstance(o, tuple) else o for o in seen)
    error = (changed - own).square().sum(-1) / own.square().sum(-1)
    assert error[:, PROMPT:].mean().item() == pytest.approx(few, rel=1e-6)
    assert error[:, :PROMPT].max() < 1e-20

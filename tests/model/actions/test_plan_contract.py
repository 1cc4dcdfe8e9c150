"""The contract of running under a plan, over architectures × plans."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import CompileConfig

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.model.actions.sizes import kv_bytes
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.permanent import make_plan
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.model.stores.base import Store
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.window import Window
from kvsharer_exp.values.plan import KVPlan
from tests.model.actions.plans import PLANS, fitted
from tests.tiny import ARCHITECTURES, contract_architectures, hooks, tiny_model, tokens

TEXTS = [str(KVPlan.parse(text)) for text in PLANS.values()]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=contract_architectures())
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(params=PLANS, ids=lambda name: name.replace(" ", "-"))
def plan(request: pytest.FixtureRequest, model: PreTrainedModel):
    return fitted(model, PLANS[request.param])


def stepwise(model: PreTrainedModel, ids: torch.Tensor, parts: list[int]) -> torch.Tensor:
    cache, logits = None, []
    for part in ids.split(parts, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


def test_steps_chunks_rows_and_no_cache_give_the_same(model, plan) -> None:
    """One forward without a cache is what is scored; all ways of serving must agree with it."""
    ids = tokens(length=21)
    close = 1e-5 if model.dtype == torch.float64 else 2e-4
    stock = model(ids).logits
    before, state = hooks(model), dict(model.state_dict())
    with apply_plan(model, plan):
        one_shot = model(ids, use_cache=False).logits
        ways = {
            "cached": model(ids, use_cache=True).logits,
            "steps": stepwise(model, ids, [11, *[1] * 10]),
            "chunks": stepwise(model, ids, [3, 6, 1, 9, 2]),
        }
        changed = ids.clone()
        changed[:, 13] = (changed[:, 13] + 1) % 100 + 3
        causal = model(changed, use_cache=False).logits
        padded, alone = left_padded(model)
    assert (one_shot - stock).abs().max() > 1e-3
    for name, logits in ways.items():
        assert (logits - one_shot).abs().max() < close, name
    torch.testing.assert_close(causal[:, :13], one_shot[:, :13], rtol=0, atol=1e-9)
    assert (padded - alone).abs().max() < close
    assert hooks(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("text", ["quantised", "readers of quantised", "quantised windows"])
def test_a_row_knows_neither_its_batch_nor_what_pads_it_on_the_right(name: str, text: str) -> None:
    """lm-eval pads its batches on the right, and passes no mask."""
    model = tiny_model(name)
    rows = [tokens(1, length, seed=length) for length in (21, 13, 8)]
    batch = torch.cat([torch.nn.functional.pad(row, (0, 21 - row.shape[1])) for row in rows])
    with apply_plan(model, fitted(model, PLANS[text])):
        alone = [model(row).logits[0] for row in rows]
        for use_cache in (False, True):
            together = model(batch, use_cache=use_cache).logits
            for mine, other in zip(together, alone, strict=True):
                torch.testing.assert_close(mine[: len(other)], other, rtol=0, atol=1e-9)


def left_padded(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The last logits of short rows: in a batch with a longer one and in two chunks, and alone."""
    rows = [tokens(1, length, seed=length) for length in (21, 13, 8)]
    batch = torch.cat([torch.nn.functional.pad(row, (21 - row.shape[1], 0)) for row in rows])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(row), (21 - row.shape[1], 0)) for row in rows]
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    output = []
    for first, last in ((0, 15), (15, 20), (20, 21)):
        part = slice(first, last)
        output.append(
            model(
                batch[:, part],
                attention_mask=mask[:, :last],
                position_ids=positions[:, part],
                past_key_values=cache,
            ).logits
        )
    together = torch.cat(output, 1)
    alone = [model(row, use_cache=False).logits[0] for row in rows]
    return torch.cat([row[-len(a) :] for row, a in zip(together, alone, strict=True)]), torch.cat(
        alone
    )


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("text", ["quantised", "readers of quantised", "stand-ins", "everything"])
def test_compiled_is_the_same(name: str, text: str) -> None:
    """With and without a cache, and for the next token; quantised layers break the graph."""
    model, ids = tiny_model(name), tokens(length=21)
    torch.compiler.reset()
    with apply_plan(model, fitted(model, PLANS[text])):
        results = []
        for run in (model, torch.compile(model, backend="eager")):
            plain = run(ids, use_cache=False).logits
            filled = run(ids, use_cache=True)
            step = run(ids[:, :1], past_key_values=filled.past_key_values).logits
            results.append(torch.cat([plain, filled.logits, step], 1))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_stand_ins_compile_whole_with_a_static_cache(name: str) -> None:
    model, ids = tiny_model(name), tokens(1, 12)
    torch.compiler.reset()
    counters.clear()
    compiler = CompileConfig(fullgraph=True, mode="default", backend="eager")
    compiler._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiler}
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.inference_mode(False), torch.no_grad():
        with apply_plan(model, fitted(model, PLANS["stand-ins"])):
            plain = model.generate(ids, **options)
            compiled = model.generate(ids, **static, **options)
        # Quantised owners are refused by name there, before anything is compiled.
        with apply_plan(model, fitted(model, PLANS["quantised"])):
            with pytest.raises(SharingError, match="layer 0 keeps 4 bits, which a Static"):
                model.generate(ids, **static, **options)
    assert counters["stats"]["unique_graphs"] > 0
    assert torch.equal(compiled, plain)


def test_generate_equals_a_search_without_cache(model, plan) -> None:
    """Greedy or by beams in turn, so that every architecture and every plan meets both."""
    ids = tokens(length=14)
    turn = list(ARCHITECTURES).index(model.config.model_type) + TEXTS.index(str(plan.plan))
    beams = 3 if turn % 2 else 1
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    options["attention_mask"] = torch.ones_like(ids)
    options["attention_mask"][1, :5] = 0
    with apply_plan(model, plan):
        cached = model.generate(ids, use_cache=True, **options)
        uncached = model.generate(ids, use_cache=False, **options)
    assert cached.shape[1] > ids.shape[1]
    assert torch.equal(cached, uncached)


def test_the_cache_holds_exactly_the_predicted_bytes(model, plan) -> None:
    """Below, at and above the boundaries of groups and windows, at each step of a decode."""
    layers = attention_layers(model)
    ids = tokens(length=27)
    dtype = next(model.parameters()).dtype
    with apply_plan(model, plan):
        cache = DynamicCache(config=model.config)
        for first, last in ((0, 5), *((n, n + 1) for n in range(5, 20)), (20, 27)):
            model(ids[:, first:last], past_key_values=cache)
            predicted = kv_bytes(plan.plan, layers, last, dtype.itemsize) * len(ids)
            assert cache_bytes(cache) == predicted, last
            packed = [layer for layer in cache.layers if isinstance(layer, Store)]
            assert sum(map(_held, packed)) == sum(t.nbytes for p in packed for t in p.tensors)
    size = footprint(model, plan.plan, context=27)
    assert size.kv_bytes == kv_bytes(plan.plan, layers, 27, dtype.itemsize)


def _held(layer: Store) -> int:
    """The memory of every tensor of floats or codes that ``layer`` reaches, whole storages.

    No full copy of a group that is quantised may survive a forward, not even behind a view.
    """
    storages = {}
    for held in vars(layer).values():
        for tensor in held if isinstance(held, tuple) else (held,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.long:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_for_good_is_the_same_and_saves_the_predicted_parameters(model, plan) -> None:
    ids = tokens()
    with apply_plan(model, plan):
        expected = model(ids).logits
    saved = footprint(model, plan.plan).parameter_bytes_saved
    norms = sum(
        sum(p.nbytes for p in layer.block.get_submodule(plan.fits[layer.index].norm).parameters())
        for layer in attention_layers(model)
        if layer.index in plan.fits and plan.fits[layer.index].norm
    )
    own = make_plan(copy.deepcopy(model), plan)
    assert torch.equal(own(ids).logits, expected)
    assert torch.equal(copy.deepcopy(own)(ids).logits, expected)
    assert own.parameter_bytes_saved == saved
    held = [sum({id(p): p.nbytes for p in m.parameters()}.values()) for m in (model, own)]
    assert held[0] - held[1] - norms == saved


def test_a_window_that_holds_all_is_the_full_cache_to_the_bit(model) -> None:
    """So is one that has let nothing go yet, whatever comes later."""
    ids, windows = tokens(length=7), KVPlan((Own(keep=Window(2, 6)),) * 6)
    stock, stepped = model(ids).logits, stepwise(model, ids, [3, 1, 1, 2])
    with apply_plan(model, windows):
        assert torch.equal(model(ids, use_cache=False).logits, stock)
        assert torch.equal(model(ids, use_cache=True).logits, stock)
        assert torch.equal(stepwise(model, ids, [3, 1, 1, 2]), stepped)


def test_plans_together_score_as_each_alone(model) -> None:
    windows = tokens(4, 20)
    plans = [fitted(model, text, seed) for seed, text in enumerate(PLANS.values())]
    check_scores_together(partial(Evaluator, model, windows), plans)


def check_scores_together(make: Callable[..., Evaluator], plans: Sequence[FittedPlan]) -> None:
    """Each alone, all in one forward, and one after the other from kept states score the same."""
    alone = [make().score(plan) for plan in plans]
    together = make().score_together(plans)
    resumed = make(batch_size=2)
    for mine, other, plan in zip(alone, together, plans, strict=True):
        again = resumed.score(plan)
        for name in ("cosines", "kls", "nlls"):
            expected = getattr(mine, name)
            assert getattr(other, name) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert getattr(again, name) == pytest.approx(expected, rel=1e-5, abs=1e-6)

"""The evaluator's shortcuts give the numbers of a plain evaluation, and skip what they claim."""

import copy
import random
from functools import partial

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import LlamaConfig, LlamaForCausalLM

from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.model.sharing.architectures import SharingError, attention_layers, may_share
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, contract_architectures, hooks, some_map, tiny_model, tokens

IDENTITY = SharingMap.identity(NUM_LAYERS)
WINDOWS = tokens(batch=5, length=12)


def plain(model, sharing_map, windows=WINDOWS):
    """Window by window, everything computed anew: (cosine, kl, nll) means."""
    rows = []
    with torch.inference_mode():
        for window in windows:
            full = model(window[None], output_hidden_states=True, use_cache=False)
            with share_kv(model, sharing_map):
                shared = model(window[None], output_hidden_states=True, use_cache=False)
            a, b = (out.hidden_states[-1].float().flatten() for out in (full, shared))
            p, q = (out.logits[0].double().log_softmax(-1) for out in (full, shared))
            rows.append(
                (
                    torch.cosine_similarity(a, b, dim=0).item(),
                    (p.exp() * (p - q)).sum(-1).mean().item(),
                    -q[:-1].gather(-1, window[1:, None]).mean().item(),
                )
            )
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def random_maps(model, count: int) -> list[SharingMap]:
    layers = attention_layers(model)
    pairs = [(t.index, s.index) for t in layers for s in layers if may_share(t, s)]
    dice = random.Random(0)
    maps = []
    for _ in range(count):
        sharing_map = IDENTITY
        for target, source in dice.sample(pairs, k=dice.randint(1, 3)):
            sharing_map = sharing_map.share(target, source)
        maps.append(sharing_map)
    return maps


@pytest.mark.parametrize("architecture", contract_architectures())
@pytest.mark.parametrize("budget", [2 << 30, 0], ids=["states-kept", "nothing-kept"])
def test_agrees_with_plain_evaluation(architecture: str, budget: int) -> None:
    model = tiny_model(architecture)
    evaluator = Evaluator(model, WINDOWS, batch_size=2, memory_budget=budget)
    assert evaluator.score(IDENTITY).kl == pytest.approx(0, abs=1e-6)
    assert evaluator.score(IDENTITY).cosine == pytest.approx(1)
    for sharing_map in random_maps(model, 3):
        scores = evaluator.score(sharing_map)
        measured = (scores.cosine, scores.kl, sum(scores.nlls) / len(WINDOWS))
        assert measured == pytest.approx(plain(model, sharing_map), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("architecture", contract_architectures())
def test_advancing_along_a_greedy_walk_agrees_with_plain_evaluation(architecture: str) -> None:
    model = tiny_model(architecture)
    evaluator = Evaluator(model, WINDOWS, batch_size=2)
    layers = attention_layers(model)
    sharing_map = IDENTITY
    dice = random.Random(1)
    for target in dice.sample(range(1, NUM_LAYERS), NUM_LAYERS - 1):
        source = next((s.index for s in layers if may_share(layers[target], s)), None)
        if source is None:
            continue
        candidate = sharing_map.share(target, source)
        keep = target % 2 == 0
        scores, accepted = evaluator.advance(
            candidate, lambda scores, left, keep=keep: None if left else keep
        )
        assert accepted is keep
        assert scores.cosine == pytest.approx(plain(model, candidate)[0], abs=1e-5)
        sharing_map = candidate if accepted else sharing_map
        assert evaluator.score(candidate).kl == pytest.approx(
            plain(model, candidate)[1], rel=1e-4, abs=1e-6
        )


def test_runs_only_the_layers_from_the_first_change_on() -> None:
    evaluator = Evaluator(tiny_model("llama"), WINDOWS, batch_size=5)

    def layers_run(action) -> int:
        before = evaluator.layers_run
        action()
        return evaluator.layers_run - before

    first = IDENTITY.share(3, 1)
    assert layers_run(lambda: evaluator.score(IDENTITY)) == NUM_LAYERS
    assert layers_run(lambda: evaluator.score(IDENTITY)) == 0
    assert layers_run(lambda: evaluator.advance(first, lambda scores, left: False)) == 3
    assert layers_run(lambda: evaluator.score(first)) == 3  # refused: not kept
    assert layers_run(lambda: evaluator.score(first)) == 0
    assert layers_run(lambda: evaluator.advance(first.share(5, 0), lambda scores, left: True)) == 1
    assert layers_run(lambda: evaluator.score(first.share(5, 0))) == 0
    assert layers_run(lambda: evaluator.score(first.share(5, 1))) == 1
    assert layers_run(lambda: evaluator.score(IDENTITY.share(5, 0))) == 1
    assert layers_run(lambda: evaluator.score(first.share(4, 0))) == 2
    evaluator.reset()
    assert layers_run(lambda: evaluator.score(IDENTITY)) == 0
    assert layers_run(lambda: evaluator.score(first.share(5, 0))) == 3


def test_advancing_stops_at_the_batch_that_decides() -> None:
    evaluator = Evaluator(tiny_model("llama"), WINDOWS, batch_size=1)
    candidate = IDENTITY.share(3, 1)
    seen = []

    def accept(scores: CandidateScores, left: int) -> bool | None:
        seen.append((len(scores.cosines), left))
        return True if len(seen) == 2 else None

    scores, accepted = evaluator.advance(candidate, accept)
    assert accepted
    assert evaluator.layers_run == 2 * (NUM_LAYERS + 3)  # the full model on those windows, too
    assert seen == [(1, len(WINDOWS) - 1), (2, len(WINDOWS) - 2)]
    assert scores.cosines == pytest.approx(evaluator.score(candidate).cosines[:2])


def test_batches_add_up_to_the_whole() -> None:
    evaluator = Evaluator(tiny_model("qwen3"), WINDOWS, batch_size=2)
    sharing_map = some_map(tiny_model("qwen3"))
    parts = evaluator.score(sharing_map, windows=slice(0, 2))
    assert len(parts.kls) == 2
    parts += evaluator.score(sharing_map, windows=slice(2, None))
    assert parts == evaluator.score(sharing_map)
    assert len(parts.kls) == evaluator.num_windows == len(WINDOWS)


def test_a_walk_by_cosine_keeps_no_probabilities() -> None:
    model = tiny_model("qwen3")
    evaluator = Evaluator(model, WINDOWS, batch_size=2)
    sharing_map = some_map(model)
    evaluator.advance(sharing_map, lambda scores, left: None if left else False)
    before = evaluator.kept_bytes
    evaluator.score(sharing_map)
    evaluator.reset()
    assert evaluator.kept_bytes == before + WINDOWS.numel() * model.config.vocab_size * 4


def test_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        before, hanging = model(WINDOWS).logits, hooks(model)
    evaluator = Evaluator(model, WINDOWS)
    evaluator.score(some_map(model))
    with pytest.raises(SharingError, match="map has 2 layers"):
        evaluator.score(SharingMap.identity(2))
    with torch.inference_mode():
        assert torch.equal(model(WINDOWS).logits, before)
    assert hooks(model) == hanging


def deep_model(num_layers: int) -> tuple[LlamaForCausalLM, torch.Tensor, int, int]:
    """The model, windows, and the bytes of one map's states and of the reference on them."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    windows = torch.randint(64, (4, 8))
    states = windows.numel() * num_layers * (16 + 2 * 8) * 4
    return LlamaForCausalLM(config).eval(), windows, states, windows.numel() * 64 * 4


@pytest.mark.parametrize("num_layers", [12, 40, 80])
def test_a_walk_runs_each_layer_once_where_two_maps_fit(num_layers: int) -> None:
    model, windows, states, probabilities = deep_model(num_layers)
    budget = 3 * states + probabilities
    evaluator = Evaluator(model, windows, batch_size=4, memory_budget=budget)
    shared, candidates = SharingMap.identity(num_layers), list(range(num_layers - 1, 0, -2))
    for target in candidates:
        shared = shared.share(target, target - 1)
        evaluator.advance(shared, lambda scores, left: True)
    # Every candidate changes an earlier layer than the one before: those behind run again.
    assert evaluator.layers_run == num_layers + sum(num_layers - t for t in candidates)


@pytest.mark.parametrize("num_layers", [12, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("maps", [0.0, 0.1, 1.0, 1.9, 2.5, 7.0])
def test_what_is_kept_fits_the_budget_and_is_used(num_layers: int, maps: float) -> None:
    model, windows, states, _ = deep_model(num_layers)
    budget = int(maps * states)
    evaluator = Evaluator(model, windows, batch_size=2, memory_budget=budget)
    dice = random.Random(0)
    layers_needed = 0
    for _ in range(40):
        shared = SharingMap.identity(num_layers)
        for target in dice.sample(range(1, num_layers), 3):
            shared = shared.share(target, 0)
        evaluator.score(shared)
        layers_needed += 2 * num_layers
        assert evaluator.kept_bytes <= budget
    assert (evaluator.layers_run < layers_needed) == (budget >= 2 * states / num_layers)
    evaluator.reset()
    assert evaluator.kept_bytes <= budget


def test_agrees_on_a_model_that_accelerate_dispatched() -> None:
    """Its hooks replace the blocks' forward; what the evaluator puts there goes away again."""
    model = copy.deepcopy(tiny_model("llama"))
    dispatched = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    for layer in dispatched.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(io_same_device=True), append=True)
    hooked = [layer.__dict__["forward"] for layer in dispatched.model.layers]
    evaluator = Evaluator(dispatched, WINDOWS, batch_size=2)
    sharing_map = some_map(dispatched, 2)
    scores = evaluator.score(sharing_map)
    assert evaluator.layers_run == 3 * (2 * NUM_LAYERS - min(sharing_map.targets))
    measured = (scores.cosine, scores.kl, sum(scores.nlls) / len(WINDOWS))
    assert measured == pytest.approx(plain(tiny_model("llama"), sharing_map), rel=1e-4, abs=1e-5)
    assert [layer.__dict__["forward"] for layer in dispatched.model.layers] == hooked


def test_batches_end_at_the_cuts() -> None:
    model = tiny_model("llama")
    evaluator = Evaluator(model, WINDOWS, batch_size=4, cuts=[1, 9])
    sharing_map = some_map(model)
    whole = Evaluator(model, WINDOWS).score(sharing_map)
    parts = [evaluator.score(sharing_map, windows=w) for w in (slice(0, 1), slice(1, None))]
    assert [len(part.kls) for part in parts] == [1, 4]
    assert (parts[0] + parts[1]).kls == pytest.approx(whole.kls, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="within a batch"):
        evaluator.score(sharing_map, windows=slice(0, 2))


@pytest.mark.parametrize("architecture", contract_architectures())
@pytest.mark.parametrize("budget", [2 << 30, 0], ids=["states-kept", "nothing-kept"])
def test_maps_in_one_forward_score_as_each_alone(architecture: str, budget: int) -> None:
    model = tiny_model(architecture)
    maps = [*random_maps(model, 4), IDENTITY]
    alone = Evaluator(model, WINDOWS, batch_size=2, memory_budget=budget)
    together = Evaluator(model, WINDOWS, batch_size=2, memory_budget=budget)
    for _ in range(2):  # from the full model's states, then from their own
        scores = together.score_together(maps)
        for sharing_map, found in zip(maps, scores, strict=True):
            expected = alone.score(sharing_map)
            assert found.cosines == pytest.approx(expected.cosines, abs=1e-5)
            assert found.kls == pytest.approx(expected.kls, rel=1e-4, abs=1e-6)
            assert found.nlls == pytest.approx(expected.nlls, rel=1e-4)


def test_maps_in_one_forward_start_where_they_part_and_leave_their_own_states() -> None:
    model = tiny_model("llama")
    evaluator = Evaluator(model, WINDOWS, batch_size=5)
    evaluator.score(IDENTITY)
    maps = [IDENTITY.share(3, 1), IDENTITY.share(4, 0), IDENTITY.share(5, 3)]
    forwards = []
    handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: forwards.append(1))
    before = evaluator.layers_run
    evaluator.score_together(maps)
    handle.remove()
    assert len(forwards) == 1
    assert evaluator.layers_run - before == 3 * (NUM_LAYERS - 3)
    ran, alone = evaluator.layers_run, Evaluator(model, WINDOWS, batch_size=5)
    for sharing_map in maps:
        evaluator.score(sharing_map)
        alone.score(sharing_map)
    assert evaluator.layers_run == ran
    # A part of a larger tensor would hold all of it.
    assert evaluator.kept_bytes == alone.kept_bytes


def test_a_layer_that_all_maps_share_projects_nothing() -> None:
    model = tiny_model("llama")
    evaluator = Evaluator(model, WINDOWS, batch_size=5)
    evaluator.score(IDENTITY)
    ran, handles = [], []
    for index in (3, 5):
        projection = model.model.layers[index].self_attn.k_proj
        hook = partial(lambda index, *_: ran.append(index), index)
        handles.append(projection.register_forward_hook(hook))
    evaluator.score_together([IDENTITY.share(3, 1), IDENTITY.share(3, 0).share(5, 0)])
    for handle in handles:
        handle.remove()
    assert ran == [5]

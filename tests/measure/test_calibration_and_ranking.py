"""Layer means are those of the cache; distances are those of the definition; ties are settled."""

import math

import pytest
import torch
from transformers import DynamicCache

from kvsharer_exp.measure.calibration import LayerMeans, block_errors, layer_means
from kvsharer_exp.measure.ranking import DISTANCES, cka, distance_matrix, euclidean_token, rank
from kvsharer_exp.model.sharing.architectures import attention_layers, may_share
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, contract_architectures, hooks, tiny_model, tokens

WINDOWS = tokens(batch=5, length=7)


@pytest.mark.parametrize("architecture", contract_architectures())
def test_means_are_the_caches_averaged_window_by_window(architecture: str) -> None:
    model = tiny_model(architecture)
    means = layer_means(model, WINDOWS, batch_size=2)  # the last batch is smaller
    expected = torch.zeros(NUM_LAYERS)
    with torch.inference_mode():
        for window in WINDOWS:
            cache = DynamicCache()
            model(window[None], past_key_values=cache)
            for index, layer in enumerate(cache.layers):
                expected[index] += layer.keys.sum().float() - layer.values.sum().float()
    measured = [
        (key.sum() - value.sum()).item() * len(WINDOWS)
        for key, value in zip(means.keys, means.values, strict=True)
    ]
    assert measured == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-2)
    assert means.num_windows == 5
    assert means.keys[0].shape[1] == 7


@pytest.mark.parametrize("architecture", contract_architectures())
def test_block_errors_are_those_of_the_whole_model_under_one_pair(architecture: str) -> None:
    """Beside the plain way: the block's output in two forwards, with and without the pair."""
    model = tiny_model(architecture)
    layers = attention_layers(model)
    before = hooks(model)
    matrix = block_errors(model, WINDOWS, batch_size=2)
    identity = SharingMap.identity(NUM_LAYERS)

    def output(sharing_map: SharingMap, block: torch.nn.Module) -> torch.Tensor:
        seen = []
        handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.inference_mode(), share_kv(model, sharing_map):
            model(WINDOWS, use_cache=False)
        handle.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    for target in layers:
        for source in layers:
            error = matrix[target.index][source.index]
            assert math.isnan(error) != may_share(target, source)
            if may_share(target, source) and target.index >= NUM_LAYERS - 2:
                own = output(identity, target.block)
                shared = output(identity.share(target.index, source.index), target.block)
                expected = (shared - own).square().sum(-1) / own.square().sum(-1)
                assert error == pytest.approx(expected.mean().item(), rel=1e-3)
    assert hooks(model) == before  # nothing is left in the model


def means_of(*layers: torch.Tensor) -> LayerMeans:
    """NUM_LAYERS layers whose keys and values are both the given tensors, repeated."""
    tensors = tuple(layers[i % len(layers)] for i in range(NUM_LAYERS))
    return LayerMeans(tensors, tensors, 1)


def test_distances_on_numbers_done_by_hand() -> None:
    zero = torch.zeros(1, 2, 2)
    far = torch.tensor([[[3.0, 4.0], [6.0, 8.0]]])  # norms per token: 5 and 10
    assert DISTANCES["euclidean_flat"](zero, far) == pytest.approx(math.sqrt(125))
    assert DISTANCES["euclidean_token"](zero, far) == pytest.approx(7.5)
    assert DISTANCES["cosine"](far, -far) == pytest.approx(2)
    assert DISTANCES["cosine"](far, 2 * far) == pytest.approx(0, abs=1e-6)


def test_cka_ignores_rotation_and_scale() -> None:
    a = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    assert cka(a, 3 * a @ rotation) == pytest.approx(0, abs=1e-6)
    assert cka(a, a.flip(1)) > 0.5
    assert cka(a, torch.zeros_like(a)) == 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("states", ["kv", "k", "v"])
def test_matrix_covers_every_pair_that_may_share(distance: str, states: str) -> None:
    model = tiny_model("gemma3_text")
    means = layer_means(model, WINDOWS)
    matrix = distance_matrix(model, means, distance=distance, states=states)
    allowed = {(t, s) for t, row in enumerate(matrix) for s, d in enumerate(row) if d == d}
    assert allowed == {(t, s) for t in range(NUM_LAYERS) for s in range(t) if (t - s) % 2 == 0}
    ranking = rank(matrix, model_id="tiny", distance=distance)
    values = [pair.distance for pair in ranking.pairs]
    assert values == sorted(values, reverse=True)
    assert {(pair.target, pair.source) for pair in ranking.pairs} == allowed
    assert ranking.num_layers == NUM_LAYERS


def test_keys_and_values_weigh_the_same() -> None:
    model = tiny_model("llama")
    means = layer_means(model, WINDOWS)
    both, keys, values = (
        distance_matrix(model, means, distance="euclidean_token", states=states)[5][2]
        for states in ("kv", "k", "v")
    )
    assert both == pytest.approx((keys + values) / 2)
    assert keys == pytest.approx(euclidean_token(means.keys[5], means.keys[2]))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_weight_of_the_keys_goes_from_values_alone_to_keys_alone(distance: str) -> None:
    model = tiny_model("llama")
    means = layer_means(model, WINDOWS)

    def matrix(**arguments) -> torch.Tensor:
        rows = distance_matrix(model, means, distance=distance, **arguments)
        return torch.tensor(rows, dtype=torch.float64)

    both, keys, values = (matrix(states=states) for states in ("kv", "k", "v"))
    assert not torch.equal(keys.nan_to_num(), values.nan_to_num())
    for weight, expected in ((1.0, keys), (0.5, both), (0.0, values)):
        assert torch.equal(matrix(key_weight=weight).nan_to_num(), expected.nan_to_num())
    quarter = matrix(key_weight=0.25)
    torch.testing.assert_close(quarter, 0.25 * keys + 0.75 * values, equal_nan=True)
    assert torch.equal(both.nan_to_num(), ((keys + values) / 2).nan_to_num())  # unweighted mean


def test_ties_are_settled_by_layer_index() -> None:
    model = tiny_model("llama")
    same = torch.ones(2, 3, 16)
    matrix = distance_matrix(model, means_of(same), distance="euclidean_flat")
    order = [(p.target, p.source) for p in rank(matrix, model_id="", distance="").pairs]
    assert order == sorted(order)
    assert len(order) == NUM_LAYERS * (NUM_LAYERS - 1) // 2

"""Public fault 1: what overflows has no score, and never the best there is."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kvsharer_exp.measure.calibration import block_errors, layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.perplexity import window_losses
from kvsharer_exp.measure.ranking import distance_matrix, rank
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.search.paper.greedy import greedy
from kvsharer_exp.search.strategies.loss_model import LossModel, pair_terms
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, tiny_model, tokens

IDENTITY = SharingMap.identity(NUM_LAYERS)
WINDOWS = tokens(batch=5, length=12)
LAYER, WINDOW = 2, 3
BAD, GOOD = IDENTITY.share(LAYER, 0), IDENTITY.share(LAYER + 1, 0)
MESSAGE = f"NaN in window {WINDOW} at layer {LAYER}: try model.dtype=bfloat16 or float32"


@pytest.fixture
def overflowing() -> nn.Module:
    """A model whose layer overflows on one window where it reads another layer's KV."""
    model = copy.deepcopy(tiny_model("llama"))
    block = model.model.layers[LAYER]

    def overflow(module, args, output):
        if not isinstance(block.self_attn.k_proj, nn.Linear):
            hidden = output[0] if isinstance(output, tuple) else output
            ids = seen[-1]
            hidden[(ids[:, :4] == WINDOWS[WINDOW, :4]).all(1)] = math.inf
        return output

    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.register_forward_hook(overflow)
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_score_is_refused_with_its_window_and_layer(overflowing, batch_size: int) -> None:
    evaluator = Evaluator(overflowing, WINDOWS, batch_size=batch_size)
    for _ in range(2):  # no state of it was kept
        with pytest.raises(NotFiniteError) as refused:
            evaluator.score(BAD)
        assert str(refused.value) == MESSAGE
    assert evaluator.score(BAD.share(LAYER, 1), windows=slice(0, 0)).kls == ()
    assert all(map(math.isfinite, evaluator.score(GOOD).kls))


def test_one_of_several_maps_is_enough_to_refuse_them_together(overflowing) -> None:
    with pytest.raises(NotFiniteError, match="in window 3 at layer 2"):
        Evaluator(overflowing, WINDOWS).score_together([BAD.share(LAYER + 1, 0), BAD])


def test_a_greedy_walk_goes_on_without_the_pair(overflowing) -> None:
    evaluator = Evaluator(overflowing, WINDOWS)
    pairs = [LayerPair(LAYER, 0, 2.0), LayerPair(LAYER + 1, 0, 1.0)]
    found = greedy(pairs, NUM_LAYERS, [1 / NUM_LAYERS], advance=evaluator.advance, threshold=-1)[0]
    assert [(step.accepted, step.cosine is None) for step in found.trace] == [
        (False, True),
        (True, False),
    ]
    assert found.kv_source_layers == GOOD.kv_source_layers


def broken_model(name: str, value: float) -> nn.Module:
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    return model


def test_a_model_that_overflows_by_itself_is_refused_by_name() -> None:
    model = broken_model(f"model.layers.{LAYER}.mlp.down_proj.weight", math.nan)
    with pytest.raises(InputError, match="the full cache gives NaN in window 0 at layer 2: try"):
        Evaluator(model, WINDOWS).score(GOOD)
    with pytest.raises(NotFiniteError, match="NaN in window 0 at layer 2"):
        window_losses(model, WINDOWS)
    with share_kv(model, GOOD), pytest.raises(NotFiniteError, match="NaN in window 0 at layer 2"):
        window_losses(model, WINDOWS)
    with pytest.raises(NotFiniteError, match="the keys of layer 3 are not finite"):
        layer_means(model, WINDOWS)


def test_no_pair_leaves_the_ranking_because_it_overflows() -> None:
    model = tiny_model("llama")
    means = layer_means(model, WINDOWS)
    means = replace(
        means, keys=tuple(key * (1e30 if i == 2 else 1) for i, key in enumerate(means.keys))
    )
    with pytest.raises(NotFiniteError, match=r"euclidean_flat between layers 2 and 0 is inf"):
        distance_matrix(model, means, distance="euclidean_flat")
    model = broken_model("model.layers.1.self_attn.v_proj.weight", 1e38)
    matrix = block_errors(model, WINDOWS)
    assert any(error == math.inf for row in matrix for error in row)
    pairs = rank(matrix, model_id="", distance="block_output").pairs
    assert len(pairs) == NUM_LAYERS * (NUM_LAYERS - 1) // 2
    losses = LossModel(pair_terms(DissimilarityRanking("", "", NUM_LAYERS, pairs), matrix))
    assert np.isfinite(losses.draw(np.random.default_rng(0))).all()

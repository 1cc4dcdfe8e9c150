"""The greedy strategy against a straightforward implementation, and its counts."""

import math
from statistics import fmean, stdev

import pytest
import torch

from kvsharer_exp.measure.calibration import layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.ranking import distance_matrix, rank
from kvsharer_exp.model.sharing.runtime import share_kv
from kvsharer_exp.search.paper.greedy import (
    adjacent_pairs,
    greedy,
    is_above,
    num_targets,
    ordered_pairs,
    trailing_layers,
)
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, contract_architectures, tiny_model, tokens

WINDOWS = tokens(batch=4, length=10)


def ranking_of(model) -> DissimilarityRanking:
    matrix = distance_matrix(model, layer_means(model, WINDOWS), distance="euclidean_token")
    return rank(matrix, model_id="tiny", distance="euclidean_token")


def plain_greedy(model, pairs, count: int, threshold: float):
    """Sentence by sentence, every candidate from scratch."""
    sources = list(range(NUM_LAYERS))
    trace = []
    with torch.inference_mode():
        full = [model.base_model(window[None], use_cache=False)[0].flatten() for window in WINDOWS]
        for pair in pairs:
            if sources[pair.target] != pair.target:
                continue
            tried = list(sources)
            tried[pair.target] = tried[pair.source]
            tried = [tried[pair.source] if s == pair.target else s for s in tried]
            cosines = []
            with share_kv(model, SharingMap(tuple(tried))):
                for window, reference in zip(WINDOWS, full, strict=True):
                    hidden = model.base_model(window[None], use_cache=False)[0].flatten()
                    cosines.append(torch.cosine_similarity(hidden, reference, dim=0).item())
            cosine = sum(cosines) / len(cosines)
            trace.append((pair.target, pair.source, cosine, cosine > threshold))
            if cosine > threshold:
                sources = tried
            if sum(s != i for i, s in enumerate(sources)) == count:
                break
    return sources, trace


@pytest.mark.parametrize("architecture", contract_architectures())
@pytest.mark.parametrize("order", ["dissimilar", "similar", "random"])
def test_same_decisions_as_the_plain_algorithm(architecture: str, order: str) -> None:
    model = tiny_model(architecture)
    pairs = ordered_pairs(ranking_of(model), order, seed=3)
    threshold = 0.6
    (result,) = greedy(
        pairs, NUM_LAYERS, [0.5], advance=Evaluator(model, WINDOWS).advance, threshold=threshold
    )
    sources, trace = plain_greedy(model, pairs, 3, threshold)
    assert result.kv_source_layers == tuple(sources)
    assert [(s.target, s.source, s.accepted) for s in result.trace] == [
        (target, source, accepted) for target, source, _, accepted in trace
    ]
    cosines = [step.cosine for step in result.trace]
    assert cosines == pytest.approx([cosine for _, _, cosine, _ in trace], abs=1e-4)


def plain_ranking(model) -> list[LayerPair]:
    """The authors' distance, sentence by sentence from the cache: mean over (head, token) of the
    L2 norm over head_dim, keys and values averaged; most dissimilar pair first."""
    keys: list = [0.0] * NUM_LAYERS
    values: list = [0.0] * NUM_LAYERS
    with torch.inference_mode():
        for window in WINDOWS:
            cache = model(window[None], use_cache=True).past_key_values
            for index, layer in enumerate(cache.layers):
                keys[index] = keys[index] + layer.keys[0].float() / len(WINDOWS)
                values[index] = values[index] + layer.values[0].float() / len(WINDOWS)
    pairs = []
    for target in range(NUM_LAYERS):
        for source in range(target):
            norms = [
                (kind[target][head, token] - kind[source][head, token]).norm().item()
                for kind in (keys, values)
                for head in range(keys[0].shape[0])
                for token in range(WINDOWS.shape[1])
            ]
            pairs.append(LayerPair(target, source, sum(norms) / len(norms)))
    return sorted(pairs, key=lambda pair: -pair.distance)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2"])
def test_the_whole_method_sentence_by_sentence(architecture: str) -> None:
    """Calibration, ranking and search: the same pairs in the same order, the same cosines."""
    model = tiny_model(architecture)
    ranking, plain = ranking_of(model), plain_ranking(model)
    assert [(p.target, p.source) for p in ranking.pairs] == [(p.target, p.source) for p in plain]
    ours = [pair.distance for pair in ranking.pairs]
    assert ours == pytest.approx([pair.distance for pair in plain], rel=1e-4)
    sources, trace = plain_greedy(model, plain, 3, 0.6)
    (result,) = greedy(
        ranking.pairs, NUM_LAYERS, [0.5], advance=Evaluator(model, WINDOWS).advance, threshold=0.6
    )
    assert result.kv_source_layers == tuple(sources)
    steps = [(s.target, s.source, s.accepted) for s in result.trace]
    assert steps == [(target, source, accepted) for target, source, _, accepted in trace]
    cosines = [step.cosine for step in result.trace]
    assert cosines == pytest.approx([cosine for _, _, cosine, _ in trace], abs=1e-4)


PAIRS = tuple(LayerPair(t, s, float(t - s)) for t in range(7, 0, -1) for s in range(t))


def accept_all(candidate, accept):
    scores = CandidateScores((0.9,))
    return scores, accept(scores, 0)


def test_one_walk_serves_every_ratio() -> None:
    together = greedy(PAIRS, 8, [0.5, 0.125, 0.25], advance=accept_all)
    alone = [greedy(PAIRS, 8, [ratio], advance=accept_all)[0] for ratio in (0.5, 0.125, 0.25)]
    assert [r.kv_source_layers for r in together] == [r.kv_source_layers for r in alone]
    assert [(r.requested, r.found, r.candidates) for r in together] == [
        (4, 4, 4),
        (1, 1, 1),
        (2, 2, 2),
    ]
    assert [len(r.trace) for r in together] == [4, 1, 2]


def test_too_few_pairs_pass() -> None:
    def refuse(candidate, accept):
        scores = CandidateScores((0.2,))
        return scores, accept(scores, 0)

    (result,) = greedy(PAIRS, 8, [0.25], advance=refuse)
    assert (result.requested, result.found, result.candidates) == (2, 0, len(PAIRS))
    assert result.kv_source_layers == tuple(range(8))
    assert not any(step.accepted for step in result.trace)


def test_a_cosine_equal_to_the_threshold_does_not_pass() -> None:
    (result,) = greedy(PAIRS, 8, [0.125], advance=accept_all, threshold=0.9)
    assert result.found == 0


def test_decides_when_the_windows_seen_leave_no_doubt() -> None:
    def decided(*cosines: float, left: int) -> bool | None:
        return is_above(0.5, CandidateScores(cosines), left)

    alike, apart = (0.90, 0.92, 0.91, 0.93, 0.90, 0.92, 0.91, 0.93), (0.2, 0.9) * 4
    assert decided(*alike, left=22) is True
    assert decided(*(cosine - 0.8 for cosine in alike), left=22) is False
    assert decided(*apart, left=22) is None  # 0.55, but it may yet fall
    assert decided(*apart, left=0) is True
    assert decided(0.9, left=1) is None  # one window says nothing of the others
    # Nearer than 11.21 (Student's t, 7 degrees of freedom, 1e-5) standard errors, then farther.
    error = stdev(alike) * math.sqrt(1 / 8 - 1 / 30)
    mean = fmean(alike)
    for distance, verdict in ((11.2, None), (11.3, True)):
        assert is_above(mean - distance * error, CandidateScores(alike), 22) is verdict


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_deciding_early_decides_alike(threshold: float) -> None:
    model = tiny_model("llama")
    many = tokens(batch=24, length=10)
    pairs = ranking_of(model).pairs

    def walk(all_windows: bool) -> GreedyResult:
        advance = Evaluator(model, many, batch_size=6).advance
        return greedy(
            pairs,
            NUM_LAYERS,
            [0.5],
            advance=advance,
            threshold=threshold,
            all_windows=all_windows,
        )[0]

    found, expected = walk(all_windows=False), walk(all_windows=True)
    assert [s.accepted for s in found.trace] == [s.accepted for s in expected.trace]
    assert {s.windows for s in expected.trace} == {24}
    assert sum(s.windows for s in found.trace) < sum(s.windows for s in expected.trace)


def test_without_the_acceptance_test_every_pair_passes_unscored() -> None:
    (result,) = greedy(PAIRS, 8, [0.25], advance=None)
    assert result.found == result.candidates == 2
    assert [step.cosine for step in result.trace] == [None, None]


@pytest.mark.parametrize(
    ("ratio", "layers", "count"), [(0.125, 30, 4), (0.25, 30, 8), (0.375, 30, 11), (0.25, 18, 5)]
)
def test_ratios_round_half_up(ratio: float, layers: int, count: int) -> None:
    assert num_targets(ratio, layers) == count


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_zero_and_all_layers_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="of 8 layers: give a ratio between"):
        num_targets(ratio, 8)


def test_orders() -> None:
    ranking = DissimilarityRanking("m", "d", 8, PAIRS)
    assert ordered_pairs(ranking, "similar") == PAIRS[::-1]
    shuffled = ordered_pairs(ranking, "random", seed=1)
    assert sorted(shuffled, key=lambda p: (p.target, p.source)) == sorted(
        PAIRS, key=lambda p: (p.target, p.source)
    )
    assert shuffled == ordered_pairs(ranking, "random", seed=1) != ordered_pairs(ranking, "random")
    with pytest.raises(InputError, match=r"search\.order=diss is unknown"):
        ordered_pairs(ranking, "diss")


def test_reference_maps() -> None:
    assert str(trailing_layers(PAIRS, 8, 3)) == "0_1_2_3_4_4_4_4"
    assert str(adjacent_pairs(PAIRS, 8, 2)) == "0_1_2_3_4_4_6_6"
    assert len(adjacent_pairs(PAIRS, 8, 6).targets) == 6


def test_reference_maps_keep_to_layers_of_one_kind() -> None:
    ranking = ranking_of(tiny_model("gemma3_text"))
    assert str(trailing_layers(ranking.pairs, 6, 2)) == "0_1_2_3_2_3"
    assert str(adjacent_pairs(ranking.pairs, 6, 1)) == "0_1_2_3_4_3"

"""Every space: any parameters decode to a valid map, every seed survives encode and decode."""

import random

import optuna
import pytest
import yaml

from kvsharer_exp.assets import data_dir
from kvsharer_exp.errors import InputError
from kvsharer_exp.records import DissimilarityRanking, LayerPair
from kvsharer_exp.search.greedy import adjacent_pairs, trailing_layers
from kvsharer_exp.search.spaces import SPACES, make_space
from kvsharer_exp.sharing_map import SharingMap

LAYERS, MAX_SHARED = 12, 5
FILES = sorted(data_dir("search_spaces").rglob("*.yaml"))


def ranking(parity: bool = False) -> DissimilarityRanking:
    """All pairs in a shuffled order; ``parity``: only layers of one kind may share."""
    pairs = [
        LayerPair(t, s, 0.0)
        for t in range(LAYERS)
        for s in range(t)
        if not parity or (t - s) % 2 == 0
    ]
    random.Random(0).shuffle(pairs)
    return DissimilarityRanking("m", "d", LAYERS, tuple(pairs))


def seeds(order: DissimilarityRanking) -> list[SharingMap]:
    return [
        make(order.pairs, LAYERS, count)
        for count in (1, 3, MAX_SHARED)
        for make in (trailing_layers, adjacent_pairs)
    ]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def make(request: pytest.FixtureRequest):
    content = yaml.safe_load(request.param.read_text())

    def build(order: DissimilarityRanking, **more):
        arguments = {"max_shared": MAX_SHARED, "seeds": seeds(order), **more}
        return make_space(content["kind"], order, **arguments, **content["options"])

    return build


def test_every_space_has_a_file() -> None:
    assert {yaml.safe_load(path.read_text())["kind"] for path in FILES} == set(SPACES)


@pytest.mark.parametrize("parity", [False, True])
def test_random_parameters_decode_to_valid_maps(make, parity: bool) -> None:
    order = ranking(parity)
    space = make(order)
    allowed = {(pair.target, pair.source) for pair in order.pairs}
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=optuna.samplers.RandomSampler(seed=0)
    )
    sizes = set()
    for _ in range(100):
        trial = study.ask(space.distributions())
        decoded = space.decode(trial.params)
        assert decoded == space.decode(trial.params)
        assert decoded.num_layers == LAYERS
        assert len(decoded.targets) <= MAX_SHARED
        for target in decoded.targets:
            assert (target, decoded.kv_source_layers[target]) in allowed
        sizes.add(len(decoded.targets))
    assert len(sizes) >= 4  # the space reaches different sizes


@pytest.mark.parametrize("parity", [False, True])
def test_seeds_survive(make, parity: bool) -> None:
    order = ranking(parity)
    space = make(order)
    for seed in seeds(order):
        params = space.encode(seed)
        assert params is not None
        assert space.decode(params) == seed
        distributions = space.distributions()
        assert params.keys() == distributions.keys()
        for name, value in params.items():
            distributions[name].to_internal_repr(value)  # raises when it is not a choice


def test_maps_outside_the_space_are_not_encoded(make) -> None:
    space = make(ranking())
    assert space.encode(SharingMap.identity(LAYERS)) is None
    assert space.encode(trailing_layers(ranking().pairs, LAYERS, MAX_SHARED + 1)) is None


def test_refusals(make) -> None:
    with pytest.raises(InputError, match="does not take these options"):
        make(ranking(), nonsense=1)
    with pytest.raises(InputError, match=r"search_space\.kind=nope is unknown"):
        make_space("nope", ranking(), max_shared=1)
    few = DissimilarityRanking("m", "d", LAYERS, ranking().pairs[:1])
    with pytest.raises(InputError, match="2 shared layers asked, but only 1 layer"):
        make_space("ranked_pairs", few, max_shared=2)

"""How many tokens each keep holds, after a prompt and the tokens that follow it."""

import pytest

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.keeps.base import Keep
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.registry import OURS, keep_from_dict, read_keep
from kvsharer_exp.values.keeps.schedule import pyramid
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.keeps.window import Window


@pytest.mark.parametrize(
    ("keep", "prompt", "context", "held"),
    [
        (Window(4, 8), 20, 20, 11),
        (Window(4, 8), 20, 7, 7),
        (SnapKV(8, 2), 20, 20, 8),
        (SnapKV(8, 2), 20, 25, 13),  # all that follow the prompt stay
        (SnapKV(8, 2), 5, 25, 25),
        (SnapKV(0.25, 2), 20, 25, 10),
        (SnapKV(0.25, 2), 10, 10, 3),  # halves up
        (SnapKV(0.01, 2), 20, 20, 2),  # at least those that observe
        (H2O(8), 20, 20, 8),
        (H2O(8), 20, 25, 8),
        (H2O(8), 3, 25, 8),
        (H2O(0.25), 20, 25, 5),
        (H2O(0.25), 4, 25, 2),
    ],
)
def test_tokens_held(keep: Keep, prompt: int, context: int, held: int) -> None:
    assert keep.held(context, prompt) == held
    if prompt >= context:
        assert keep.held(context) == held


def test_the_half_of_an_odd_budget_that_is_recent_is_the_larger() -> None:
    assert [H2O(n).recent(n) for n in (2, 3, 8, 9)] == [1, 2, 4, 5]


def test_every_keep_says_what_it_is_and_comes_back_from_json() -> None:
    keeps = [Window(4, 252), SnapKV(512), SnapKV(0.5, 8), H2O(2), H2O(0.0625)]
    assert {type(keep) for keep in keeps} == set(OURS)
    for keep in keeps:
        assert read_keep(str(keep)) == keep
        assert keep_from_dict(keep.to_dict()) == keep
        assert keep.words
    assert [type(keep).prompted for keep in keeps] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(True), "a budget of True tokens: give a whole number"),
        (lambda: H2O("9"), "a budget of '9' tokens"),
        (lambda: H2O(1.5), "a budget of 1.5 tokens.*fraction of the prompt"),
        (lambda: H2O(0.123456), "at most four decimals"),
        (lambda: read_keep("snap0.03125+16"), "budget of 0.03125 tokens: .* at most four decimals"),
        (lambda: read_keep("h1.5"), "budget of 1.5 tokens: give a whole number"),
        (lambda: SnapKV(9, "2"), "observes=2: give a whole number"),
        (lambda: keep_from_dict({"keep": "h2", "keep_": 3}), "keep 'h2' is unknown: did you mean"),
        (lambda: keep_from_dict({"keep": "h2o", "size": 3}), "h2o does not take size"),
    ],
)
def test_what_is_no_keep_is_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("mean", [0.8, 0.5, 0.1])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_pyramid_falls_and_keeps_what_it_is_asked_to(mean: float, count: int) -> None:
    layers = range(3, 3 + count)
    keeps = pyramid(layers, mean, observe=4)
    fractions = [keeps[layer].budget if layer in keeps else 1 for layer in layers]
    assert sum(fractions) / count == pytest.approx(mean, abs=1e-4)
    assert fractions == sorted(fractions, reverse=True)
    assert count == 1 or fractions[0] > fractions[-1] >= mean / 10 - 1e-4
    assert all(keep.observe == 4 for keep in keeps.values())


def test_a_pyramid_of_more_than_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"keeps 1\.5 on average: give a fraction"):
        pyramid(range(4), 1.5)

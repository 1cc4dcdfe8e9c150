"""The card of a plan says what each layer does, what it keeps, and how to load it."""

from dataclasses import replace

import pytest

from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.reporting.model_card import Measured, model_card
from kvsharer_exp.values.footprint import Footprint, MeasuredFootprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

SIZE = Footprint(10.5, 0.25, -1234, MeasuredFootprint(100, 7), context=4096, kv_bytes=43008)
MEASURED = Measured(
    size=SIZE,
    scores={"kl": 0.1, "perplexity/report": 3.0},
    full={"kl": 0.0, "perplexity/report": 2.0},
    scoring=("text a", 2, 3),
    held_out=("text b", 4, 5),
    device="cpu",
    seed=0,
    versions={"torch": "1", "transformers": "2", "kvsharer_exp": "3", "git_commit": "c"},
)


def card(plan: FittedPlan | KVPlan | SharingMap) -> str:
    spec = ModelSpec(name="m", source="random:tiny")
    return model_card(spec, {"fingerprint": "ff", "dtype": "float32"}, plan, MEASURED)


@pytest.fixture(scope="module")
def text() -> str:
    plan = KVPlan.parse("0_1q4s2_0_0k3v_x_a_c_7q3g64_0_0k1v")
    return card(FittedPlan(plan, {5: Fit({}, "norm"), 6: Fit({})}))


@pytest.mark.parametrize(
    "row",
    [
        "| 0 | kept in 16 bits |",
        "| 1 | kept in 4 bits, by groups of 32 tokens, the first 2 in full |",
        "| 2, 8 | read from layer 0 |",
        "| 3 | keys read from layer 0, values kept in 16 bits |",
        "| 4 | none: nothing in place of attention |",
        "| 5 | none: a linear map, fitted by ridge regression, in place of attention and norm |",
        "| 6 | none: a constant, the mean of its output, in place of attention |",
        "| 7 | kept in 3 bits, by groups of 64 tokens |",
        "| 9 | keys read from layer 0, values read from layer 1 |",
    ],
)
def test_the_table_says_what_each_layer_does(text: str, row: str) -> None:
    assert row in text.splitlines()


def test_the_card_says_what_is_kept_and_how_to_load_it(text: str) -> None:
    assert "- plan: `0_1q4s2_0_0k3v_x_a_c_7q3g64_0_0k1v`" in text
    assert "43,008 bytes after 4,096 tokens, 25.0% of the" in text
    assert "1,234 bytes more than the source's" in text
    assert "runs modeling_kv_plan.py" in text
    assert "kvsharer_exp.load_exported(folder)" in text
    assert "| score | full | plan | retained |" in text
    assert "files modeling_kv_plan.py and kvplan_*.py are Apache-2.0" in text
    assert "shared" not in text


def test_keeps_of_a_prompt_are_named_with_what_they_need() -> None:
    made = card(KVPlan.parse("0_1q4snap0.25+8_2q4h9_3h9"))
    assert "| 1 | kept in 4 bits of 25 % of the tokens of the prompt that its last 8" in made
    assert "| 2 | kept in 4 bits of 9 tokens with the most attention, token by token |" in made
    assert "| 3 | kept in 16 bits of 9 tokens with the most attention |" in made
    assert "so prefill it in one." in made and "are a prompt" not in made
    long = replace(MEASURED, prompt=96)
    spec = ModelSpec(name="m", source="random:tiny")
    of_map = model_card(spec, {"fingerprint": "f", "dtype": "d"}, KVPlan.parse("0_1_0"), long)
    assert "The first 96 tokens of each are a prompt" in of_map and "prefill" not in of_map


def test_a_plan_that_is_a_map_has_the_card_of_the_map() -> None:
    sharing_map = SharingMap.parse("0_1_0_1")
    expected = card(sharing_map)
    assert "- targets ← sources: 2 ← 0, 3 ← 1" in expected
    assert "modeling_kv_shared.py" in expected and "kvplan" not in expected
    plan = KVPlan.of(sharing_map)
    assert card(plan) == card(FittedPlan(plan)) == expected

"""Plans: their texts, their rules, chains, and that a map is a plan."""

import json

import pytest

from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.actions.registry import action_classes, action_from_dict, read_action
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.keeps.window import Window
from kvsharer_exp.values.plan import KVPlan, KVPlanError
from kvsharer_exp.values.precision import BITS, Precision
from kvsharer_exp.values.sharing_map import SharingMap, SharingMapError
from tests.refusals import check_refusal

EVERY = "0_1q4s4_0_a_4k0v_5_c_x_8q3g64s4_0k1v_10w4+252_11q4w4+60_10"


def test_a_text_comes_back_and_so_does_json() -> None:
    plan = KVPlan.parse(EVERY)
    assert str(plan) == EVERY
    assert KVPlan.from_json(plan.to_json()) == plan == KVPlan.parse(plan.to_json())
    assert KVPlan.from_json(json.dumps({"plan": EVERY})) == plan
    assert json.loads(plan.to_json())["plan"] == EVERY
    assert [action.name for action in plan.actions[:5]] == [
        "own", "own", "read", "affine", "read_kv",
    ]  # fmt: skip
    assert plan.actions[1] == Own(4, sinks=4)
    assert plan.owners == (0, 1, 5, 8, 10, 11)
    assert plan.targets == (2, 4, 9, 12)
    assert plan.key_sources == (0, 1, 0, None, 4, 5, None, None, 8, 0, 10, 11, 10)
    assert plan.value_sources == (0, 1, 0, None, 0, 5, None, None, 8, 1, 10, 11, 10)
    assert plan.sharing_map is None


def test_a_map_is_a_plan_and_prints_digests_and_stores_as_one() -> None:
    sharing_map = SharingMap.parse("0_1_0_3_1")
    plan = KVPlan.of(sharing_map)
    assert plan == KVPlan.parse("0_1_0_3_1") == KVPlan.parse([0, 1, 0, 3, 1])
    assert plan.sharing_map == sharing_map
    assert (str(plan), plan.digest, plan.to_json()) == (
        str(sharing_map), sharing_map.digest, sharing_map.to_json(),
    )  # fmt: skip
    assert KVPlan.from_json(sharing_map.to_json()) == plan
    assert KVPlan.full(3).sharing_map == SharingMap.identity(3)
    assert plan.owners == sharing_map.owners
    assert plan.targets == sharing_map.targets
    assert KVPlan.parse("0_1q4_0").sharing_map is None


@pytest.mark.parametrize(
    ("text", "layer", "action"),
    [
        ("5", 5, Own()),
        ("5q16", 5, Own()),
        ("5q16g64s4", 5, Own()),
        ("5q4", 5, Own(4)),
        ("5q4g64s4", 5, Own(4, 64, 4)),
        ("5q4g32s0", 5, Own(4)),
        ("5w4+252", 5, Own(keep=Window(4, 252))),
        ("5q4w4+252", 5, Own(4, keep=Window(4, 252))),
        ("5q3g64w0+9", 5, Own(3, 64, keep=Window(0, 9))),
        ("5snap512+32", 5, Own(keep=SnapKV(512, 32))),
        ("5q4snap0.25+8", 5, Own(4, keep=SnapKV(0.25, 8))),
        ("5h512", 5, Own(keep=H2O(512))),
        ("5q8h0.0625", 5, Own(8, keep=H2O(0.0625))),
        ("0", 5, Read(0)),
        ("0k7v", 9, ReadKV(0, 7)),
        ("0k0v", 5, Read(0)),
        ("5k5v", 5, Own()),
        ("5k0v", 5, ReadKV(5, 0)),
        ("x", 5, Drop()),
        ("c", 5, Constant()),
        ("a", 5, Affine()),
    ],
)
def test_every_text_has_one_meaning_and_one_simplest_form(text, layer, action) -> None:
    assert read_action(text, layer) == action
    assert read_action(action.text(layer), layer) == action
    assert action_from_dict(action.to_dict()) == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5Q4",
        "q4",
        "0q4",
        "5s4",
        "5g64",
        "k5v",
        "xx",
        "5q4s4g8",
        "-1",
        "5w4",
        "5w4+",
        "5w4+2q4",
        "w4+2",
        "5h.5",
        "5snap9",
        "5snap9+0.5",
        "5w4+0.5",
    ],
)
def test_what_is_no_text_means_nothing(text: str) -> None:
    assert read_action(text, 5) is None


@pytest.mark.parametrize("digit", ["٥", "５", "५"])
@pytest.mark.parametrize(
    "text",
    [
        *("5", "0", "5q4", "5q4g56", "5q4s5", "5w5+9", "5w4+5", "5q4w4+5", "5snap50+5"),
        *("5snap0.5+5", "5h5", "5h0.5", "0k5v", "5k0v"),
    ],
)
def test_digits_of_other_scripts_are_no_numbers(text: str, digit: str) -> None:
    assert read_action(text, 5) is not None
    for number in "05":
        other = text.replace(number, digit)
        assert other == text or read_action(other, 5) is None
    with pytest.raises(SharingMapError, match="٥"):
        SharingMap.parse("0_٥")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0_1q5", "layer 1 has '1q5': 5 bits: give one of 2, 3, 4, 8, 16"),
        ("0_1q4g12", "a group of 12 tokens: give a multiple of 8"),
        ("0_1q4s33", "33 sink tokens: give 0 to 32"),
        (
            "0_1w4+0",
            "layer 1 has '1w4.0': a window with 0 recent tokens: give a whole number of at",
        ),
        (
            "0_1q4s4w4+9",
            "s4 beside w4.9: what it keeps says which tokens stay in full, leave the s",
        ),
        ("0_1q4s4h9", "s4 beside h9: what it keeps says"),
        (
            "0_1h1",
            "layer 1 has '1h1': h keeps a budget of 1 tokens: give a whole number of at least",
        ),
        ("0_1snap31+32", "last 32 tokens choose a budget of 31 tokens: give a whole number of at"),
        ("0_1snap0.0+32", "of 0.0 tokens: give .* or a fraction of the prompt like 0.25"),
        ("0_1snap9+0", "the number of tokens that snap observes=0: give at least 1"),
        ("0_1h9_2k1v", "layer 2 reads .* two layers, but layer 1 does not hold"),
        ("0_1q4w40+9", "40 sink tokens: give 0 to 32"),
        ("0_1w4+9_0k1v", "layer 2 reads keys and values of two layers, but layer 1 does not hold"),
        ("0_x_1", "layer 2 reads the keys of layer 1, which has none"),
        ("0_1q4_2_2k5v", "layer 3 reads the values of layer 5: give an earlier layer"),
        ("0_0_2k1v", "layer 2 reads the values of layer 1, which reads those of layer 0: name 0"),
        ("x_a_c", "no layer of the plan owns its KV"),
        ("0k0v_x", "no layer of the plan owns|layer 1"),
        ("0_y", "layer 1 has 'y', which is no action"),
        ("a_1k0v", "layer 1 reads the values of layer 0, which has none"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(text: str, message: str) -> None:
    if text == "0k0v_x":  # layer 0 reading itself is owning
        assert str(KVPlan.parse(text)) == "0_x"
        return
    with pytest.raises(KVPlanError, match=message):
        KVPlan.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"plan": 5}', "plan JSON has 5 as its plan: give what each layer does as text"),
        ('{"kv_plan": null}', "plan JSON has None as its kv_plan: give"),
        ('{"actions": "0_1"}', "plan JSON has '0_1' as its actions: give"),
        ('{"actions": [{"action": "own"}, {}]}', "layer 1 has '{}': it names no action"),
        ('{"actions": [{"action": "afine"}]}', "layer 0 .*: action 'afine' is unknown"),
        ('{"actions": [{"action": "own", "bits": 7}]}', "layer 0 has .*: 7 bits"),
    ],
)
def test_json_that_holds_no_plan_is_refused_in_the_words_of_plans(text: str, message: str) -> None:
    with pytest.raises(KVPlanError, match=message):
        KVPlan.parse(text)


def test_a_map_that_breaks_a_rule_is_refused_in_the_words_of_maps() -> None:
    with pytest.raises(SharingMapError, match="name 0 instead"):
        KVPlan.parse("0_0_1")
    with pytest.raises(KVPlanError, match="no sequence of actions"):
        KVPlan(Own())  # type: ignore[arg-type]
    with pytest.raises(KVPlanError, match="which is no action"):
        KVPlan((Own(), 0))  # type: ignore[arg-type]


def test_half_an_owner_holds_no_length_and_its_half_can_be_read() -> None:
    plan = KVPlan.parse("0_1k0v_1k0v")
    assert plan.owners == (0,)
    assert plan.targets == (1, 2)
    with pytest.raises(KVPlanError, match="name 0 instead"):
        KVPlan.parse("0_1k0v_1")


def test_replacing_resolves_chains_and_readers_follow() -> None:
    plan = KVPlan.parse("0_1_1_3_a")
    assert str(plan.replace(3, Read(2))) == "0_1_1_1_a"
    assert str(plan.replace(1, Read(0))) == "0_0_0_3_a"
    assert str(plan.replace(1, Own(4))) == "0_1q4_1_3_a"
    assert str(plan.replace(1, ReadKV(1, 0))) == "0_1k0v_1k0v_3_a"
    assert plan.replace(4, Own()).actions[4] == Own()
    with pytest.raises(KVPlanError, match="layer 2 reads the keys of layer 1, which has none"):
        plan.replace(1, Drop())
    with pytest.raises(KVPlanError, match="layers go from 0 to 4"):
        plan.replace(5, Drop())


def test_the_registry_holds_every_action_once_and_refuses_others() -> None:
    names = {name: action for name, action in action_classes().items()}
    assert set(names) == {"own", "read", "read_kv", "drop", "constant", "affine"}
    assert all(issubclass(action, Action) for action in names.values())
    with pytest.raises(InputError, match="did you mean affine"):
        action_from_dict({"action": "afine"})
    with pytest.raises(InputError, match="does not take bits"):
        action_from_dict({"action": "drop", "bits": 4})
    for keep, says in (
        ({"keep": "windo"}, "did you mean window"),
        ({"keep": "window", "sinks": 4}, "keep window does not take sinks"),
        ({"keep": "window", "sinks": "4", "recent": 9}, "a window with '4' sinks tokens"),
        ("w4+9", "is no keep"),
    ):
        with pytest.raises(InputError, match=says):
            action_from_dict({"action": "own", "keep": keep})


def test_numbers_that_are_none_and_too_long_ones_are_refused() -> None:
    for source in ("0", 0.0, [0]):
        text = json.dumps({"actions": [{"action": "own"}, {"action": "read", "source": source}]})
        with pytest.raises(KVPlanError, match=r"layer 1 reads the keys of .*whole number"):
            KVPlan.from_json(text)
    long = "9" * 5000
    for text in (f"0_{long}", f"0_1q{long}", f"0_{long}k0v", f"[0, {long}]", "[" * 5000):
        with pytest.raises(InputError) as error:
            KVPlan.parse(text)
        check_refusal(f"kvsharer: {error.value}", "give")
    assert KVPlan((Own(4.0),)).to_json() == KVPlan((Own(4),)).to_json()


def test_bytes_of_a_precision_are_those_of_its_layout() -> None:
    full, packed = Precision(), Precision(4, 32, 4)
    assert (
        full.key_bytes(100, 0, 3, 64, 2) == 100 * 3 * 64 * 2 == full.value_bytes(100, 0, 3, 64, 2)
    )
    # 3 groups of 32 tokens × 4 bits with 4 bytes of scale and minimum a channel, 4 sinks and 4
    # tokens of the open group in full.
    assert packed.key_bytes(100, 0, 3, 64, 2) == 3 * 64 * (3 * (16 + 4) + 8 * 2)
    # Each token 64 × 4 bits and two groups of channels; 4 sinks in full.
    assert packed.value_bytes(100, 0, 3, 64, 2) == 3 * (100 * (32 + 2 * 4) + 4 * 64 * 2)
    for bits in BITS[:-1]:
        precision, size = Precision(bits), 2 * 4096 * 3 * 64
        held = precision.key_bytes(4096, 0, 3, 64, 2) + precision.value_bytes(4096, 0, 3, 64, 2)
        assert held * 8 == size * (bits + 32 / 32)
    assert [Precision(4, 64).channels(d) for d in (64, 80, 96, 256)] == [64, 40, 48, 64]

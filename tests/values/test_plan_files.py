"""Plans in files: one, several with a choice, folders, and what is refused."""

import json
from pathlib import Path

import pytest

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan, KVPlanError
from kvsharer_exp.values.plan_files import PlanFileError, json_of_folder
from kvsharer_exp.values.sharing_map import SharingMap
from tests.refusals import check_refusal

MAP, PLAN, STAND_IN = "0_1_0_3", "0_1q4_0_x", "0_1q2_a_x"
FRONT = [
    {"kv_source_layers": [0, 1, 2, 3], "kv_fraction": 1.0, "scores": {"kl": 0.0}},
    {"kv_source_layers": [0, 1, 0, 3], "kv_fraction": 0.75, "scores": {"kl": 0.2}},
    {"kv_source_layers": None, "plan": PLAN, "kv_fraction": 0.4, "scores": {"kl": 0.1}},
    {"kv_source_layers": None, "plan": STAND_IN, "kv_fraction": 0.3, "scores": {"kl": 0.6}},
]


@pytest.fixture
def front(tmp_path: Path) -> Path:
    path = tmp_path / "front.json"
    path.write_text(json.dumps(FRONT))
    return path


def test_a_file_holds_a_plan_its_actions_or_a_map(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    for text in (PLAN, STAND_IN, MAP):
        plan = KVPlan.parse(text)
        for content in (plan.to_json(), json.dumps({"plan": text}), json.dumps({"kv_plan": text})):
            path.write_text(content)
            assert KVPlan.parse(path) == KVPlan.parse(str(path)) == plan


def test_a_fraction_names_the_best_plan_that_keeps_at_most_that(front: Path) -> None:
    # 0.4 of the KV and a smaller KL beat the map that keeps 0.75
    for choice in ("0.8", "0.75", "0.4"):
        assert str(KVPlan.parse(f"{front}:{choice}")) == PLAN
    assert str(KVPlan.parse(f"{front}:1.0")) == "0_1_2_3"
    assert str(KVPlan.parse(f"{front}:0.39")) == str(KVPlan.parse(f"{front}:.3")) == STAND_IN


def test_a_score_goes_before_the_kl_and_without_both_more_kv_is_better(tmp_path: Path) -> None:
    entries = [dict(entry, score=-i) for i, entry in enumerate(FRONT)]
    (tmp_path / "scored.json").write_text(json.dumps({"front": entries}))
    assert str(KVPlan.parse(f"{tmp_path}/scored.json:0.8")) == MAP
    (tmp_path / "bare.json").write_text(json.dumps([{**e, "scores": {}} for e in FRONT]))
    assert str(KVPlan.parse(f"{tmp_path}/bare.json:0.5")) == PLAN


def test_a_whole_number_is_that_of_shared_layers_among_the_maps(front: Path) -> None:
    assert str(KVPlan.parse(f"{front}:1")) == MAP
    assert str(KVPlan.parse(f"{front}:0")) == "0_1_2_3"


def test_a_front_without_maps_asks_for_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text(json.dumps(FRONT[2:]))
    for choice in ("", ":4"):
        with pytest.raises(PlanFileError, match=r"no map: name one like front\.json:0\.25"):
            KVPlan.parse(f"{tmp_path}/front.json{choice}")


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"plan": "0_1q4')
    for read, value in (
        (KVPlan.parse, tmp_path / "result.json"),
        (SharingMap.parse, str(tmp_path / "result.json")),
        (json_of_folder, tmp_path),
    ):
        with pytest.raises(PlanFileError) as refused:
            read(value)
        check_refusal(f"kvsharer: {refused.value}\n", "result.json is not JSON (")


def test_an_empty_text_is_no_plan() -> None:
    with pytest.raises(KVPlanError, match="plan is empty"):
        KVPlan.parse(" ")


def test_the_only_plan_of_several_needs_no_choice(tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text(json.dumps(FRONT[2:3]))
    assert str(KVPlan.parse(f"{tmp_path}/front.json")) == PLAN


def test_a_folder_has_a_plan_an_export_or_a_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema": 1, "plan": MAP}))
    assert str(KVPlan.from_json(json_of_folder(tmp_path))) == MAP
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    assert str(KVPlan.from_json(json_of_folder(tmp_path))) == MAP
    (tmp_path / "config.json").write_text(json.dumps({"kv_plan": PLAN}))
    assert str(KVPlan.from_json(json_of_folder(tmp_path))) == PLAN
    (tmp_path / "plan.json").write_text(KVPlan.parse(STAND_IN).to_json())
    assert str(KVPlan.from_json(json_of_folder(tmp_path))) == STAND_IN


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (":0.2", "give 0.3 or more"),
        (":3", "0, 1 shared layers"),
        ("", "0, 1 shared layers"),
        (":1.2.3", "1.2.3"),
    ],
)
def test_a_choice_that_names_none_is_refused(front: Path, choice: str, names: str) -> None:
    with pytest.raises(PlanFileError) as error:
        KVPlan.parse(f"{front}{choice}")
    check_refusal(f"kvsharer: {error.value}", names)


def test_what_is_no_file_and_no_plan_is_refused(tmp_path: Path) -> None:
    long = "y" * 300
    for value, kind, names in (
        (f"{long}.json", PlanFileError, "yyy"),
        (tmp_path / "absent.json", PlanFileError, "absent.json"),
        (f"{tmp_path}/absent", KVPlanError, "absent"),
        (long, KVPlanError, "yyy"),
    ):
        with pytest.raises(kind) as error:
            KVPlan.parse(value)
        check_refusal(f"kvsharer: {error.value}", names)
    with pytest.raises(PlanFileError) as error:
        json_of_folder(tmp_path)
    check_refusal(f"kvsharer: {error.value}", "has no plan")


def test_numbers_that_are_none_choose_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    odd = [{"kv_fraction": size} for size in ("0.1", None, True, float("nan"), 10**400)]
    odd += [{"kv_fraction": 0.4, "scores": scores} for scores in (["kl"], {"kl": "low"}, 7)]
    path.write_text(json.dumps([{"plan": STAND_IN, **entry} for entry in odd] + FRONT))
    assert str(KVPlan.parse(f"{path}:0.45")) == PLAN


@pytest.mark.parametrize("name", ["a\0.json", "\ud800.json"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    for parse in (KVPlan.parse, SharingMap.parse):
        with pytest.raises(InputError, match="no file can have this name"):
            parse(name)

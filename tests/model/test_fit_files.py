"""Fits in files come back as they were, or are refused in a line; plans load with their fits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvsharer_exp import FittedPlan, KVPlan, apply_plan, fit_plan, load_plan
from kvsharer_exp.model.fit_files import (
    FitFileError,
    load_fits,
    save_each,
    save_fits,
    save_plan,
)
from kvsharer_exp.model.fitted_plan import Fit
from kvsharer_exp.values.errors import InputError
from tests.refusals import check_refusal
from tests.tiny import tiny_model, tokens

PLAN = KVPlan.parse("0_1q4_0_x_c_a")
ORIGIN = {"model": "abc", "text": "def"}


@pytest.fixture(scope="module")
def fitted() -> FittedPlan:
    made = fit_plan(tiny_model("gemma3_text"), PLAN, tokens(8, 24, seed=3))
    return replace(made, origin=ORIGIN)


def test_fits_come_back_bit_for_bit_and_the_model_answers_the_same(fitted, tmp_path: Path) -> None:
    path = tmp_path / "fits.safetensors"
    save_fits(path, fitted)
    again = load_fits(path, PLAN, origin=ORIGIN)
    assert again.keys == fitted.keys
    assert {i: (f.norm, f.error) for i, f in again.fits.items()} == {
        i: (f.norm, f.error) for i, f in fitted.fits.items()
    }
    assert load_fits(path, PLAN).origin == ORIGIN
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    model, ids = tiny_model("gemma3_text"), tokens()
    logits = []
    for plan in (fitted, again):
        with apply_plan(model, plan), torch.inference_mode():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_an_error_while_writing_leaves_the_old_file(fitted, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "fits.safetensors"
    save_fits(path, fitted)

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_fits(path, replace(fitted, origin={"model": "other"}))
    assert load_fits(path, PLAN).origin == ORIGIN
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def refused(path: Path, plan: KVPlan, names: str, **origin: str) -> None:
    with pytest.raises(FitFileError) as error:
        load_fits(path, plan, origin=origin)
    check_refusal(f"kvsharer: {error.value}", names)


def test_fits_of_another_model_text_or_plan_are_refused(fitted, tmp_path: Path) -> None:
    path = tmp_path / ("a_long_name_of_a_folder" * 6) / "fits.safetensors"
    path.parent.mkdir()
    save_fits(path, fitted)
    refused(path, PLAN, "of model abc, not xyz", model="xyz")
    refused(path, PLAN, "of text def, not xyz", text="xyz")
    refused(path, PLAN, "not t", windows="t" * 99)
    refused(path, PLAN.replace(3, PLAN.actions[0]), "of the plan")


def test_damaged_files_are_refused(fitted, tmp_path: Path) -> None:
    path = tmp_path / "fits.safetensors"
    refused(path, PLAN, "no fits")
    save_fits(path, fitted)
    whole = path.read_bytes()
    for content in (b"", b"no numbers", whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(content)
        refused(path, PLAN, "damaged")
    save_file({"x": torch.zeros(2)}, path)  # a safetensors file of something else
    refused(path, PLAN, "damaged")


def test_numbers_that_were_changed_are_seen_by_their_fingerprint(fitted, tmp_path: Path) -> None:
    path = tmp_path / "fits.safetensors"
    save_fits(path, fitted)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    tensors["5.bias"] = tensors["5.bias"] + 1
    save_file(tensors, path, metadata)
    refused(path, PLAN, "not those that were written")
    save_file({**tensors, "4.more": torch.zeros(1)}, path, metadata)
    refused(path, PLAN, "not those that were written")


def test_a_plan_loads_from_text_a_file_a_folder_and_a_front(fitted, tmp_path: Path) -> None:
    assert load_plan("0_1q4_0_x") == KVPlan.parse("0_1q4_0_x")
    assert load_plan(fitted) is fitted
    save_plan(tmp_path, fitted)
    for value in (tmp_path, str(tmp_path)):
        loaded = load_plan(value)
        assert isinstance(loaded, FittedPlan)
        assert loaded.plan == PLAN
        assert loaded.keys == fitted.keys
    front = tmp_path / "front.json"
    front.write_text('[{"plan": "0_1q2", "kv_fraction": 0.6}, {"plan": "0_0", "kv_fraction": 0.5}]')
    assert str(load_plan(f"{front}:0.5")) == "0_0"
    plain = tmp_path / "plain"
    plain.mkdir()
    save_plan(plain, FittedPlan(KVPlan.parse("0_x")))
    assert load_plan(plain) == KVPlan.parse("0_x")


def test_plans_of_a_front_load_with_the_fits_beside_it(fitted, tmp_path: Path) -> None:
    """A plan with stand-ins was refused, although the sweep had fitted them."""
    full = KVPlan.full(PLAN.num_layers)
    layer = max(fitted.fits)
    alone = FittedPlan(full.replace(layer, PLAN.actions[layer]), {layer: fitted.fits[layer]})
    front = tmp_path / "front.json"
    plans = [(0.9, full), (0.5, alone.plan), (0.1, PLAN)]
    entries = [{"plan": str(plan), "kv_fraction": kv, "score": kv} for kv, plan in plans]
    front.write_text(json.dumps(entries))
    save_each(tmp_path / "fits", [alone, FittedPlan.of(full), fitted], origin=ORIGIN)
    assert len(list((tmp_path / "fits").iterdir())) == len(fitted.fits)
    for choice, held in ((0.5, alone), (0.1, fitted)):
        loaded = load_plan(f"{front}:{choice}")
        assert isinstance(loaded, FittedPlan)
        assert (loaded.plan, loaded.keys) == (held.plan, held.keys)
    assert load_plan(f"{front}:0.9") == full
    next((tmp_path / "fits").glob(f"{layer}_*")).unlink()
    with pytest.raises(InputError, match="there are no fits at"):
        load_plan(f"{front}:0.1")


def test_stand_ins_without_fits_are_refused(fitted, tmp_path: Path) -> None:
    save_plan(tmp_path, fitted)
    (tmp_path / "fits.safetensors").unlink()
    for value in ("0_a", tmp_path):
        with pytest.raises(InputError, match="make it with fit_plan") as error:
            load_plan(value)
        check_refusal(f"kvsharer: {error.value}", "has no fit")


def test_a_fit_has_other_fingerprint_for_another_norm(fitted) -> None:
    fit = fitted.fits[5]
    assert Fit(fit.tensors, "some_norm").fingerprint != Fit(fit.tensors, None).fingerprint

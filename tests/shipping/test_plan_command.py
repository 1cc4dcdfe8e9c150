"""`kvsharer export plan=…` end to end on the tiny model."""

from pathlib import Path

import pytest
import torch

from kvsharer_exp import FittedPlan, apply_plan, load_exported, load_model, load_plan
from kvsharer_exp.values.plan import KVPlan
from tests.cli.commands import test_commands as commands

run = commands.run  # a fixture


@pytest.mark.parametrize("plan", ["0_1q4g8s2_c_0_x_a", "0_1q4g8_0k1v_3_x_1"])
def test_the_folder_is_the_plan_that_was_scored(run, plan: str, capsys) -> None:
    result = run("export", f"plan={plan}")
    folder = Path(result["export"]["path"])
    plan = str(KVPlan.parse(plan))
    assert result["plan"] == plan and result["kv_source_layers"] is None
    model, tokenizer = load_exported(folder)
    original, _ = load_model("tiny", device="cpu")
    ids = tokenizer("What is exported is what was scored.", return_tensors="pt").input_ids
    kept = load_plan(folder)
    if isinstance(kept, FittedPlan):
        of_run = load_plan(result["folder"])
        assert isinstance(of_run, FittedPlan)
        assert (kept.keys, kept.origin) == (of_run.keys, of_run.origin)
    with torch.inference_mode(), apply_plan(original, kept):
        expected = original(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)
    card = (folder / "README.md").read_text()
    assert f"`{plan}`" in card
    assert all(len(line) <= 200 for line in card.splitlines())
    assert f"{result['scores']['perplexity/report']:.4g}" in card
    named = folder if "a" in plan else folder / "kv_plan.json"
    assert f"plan={named}" in "".join(capsys.readouterr().out.split("\n"))
    said = run("generate", f"plan={named}", "generate.prompt=Hello", "generate.max_new_tokens=2")
    assert said["plan"] == plan
    used = load_plan(said["folder"]) if "a" in plan else kept
    assert getattr(used, "keys", used) == getattr(kept, "keys", kept)
    if "a" in plan:  # as in an export that transformers has saved again
        assert "no fits with it" not in capsys.readouterr().out
        (folder / "fits.json").unlink()
        run("generate", f"plan={folder}", "generate.prompt=Hello", "generate.max_new_tokens=2")
        assert "no fits with it" in capsys.readouterr().out


@pytest.mark.slow
def test_the_scores_are_those_of_evaluate(run) -> None:
    plan = "plan=0_1q4g8s2_0k1v_1_x_5"
    exported, evaluated = run("export", plan), run("evaluate", plan)
    for name, value in exported["scores"].items():
        assert value == pytest.approx(evaluated["scores"][name], rel=1e-5)
    assert exported["footprint"] == evaluated["footprint"]

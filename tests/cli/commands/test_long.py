"""``scoring=long`` scores what follows a prompt; keeps that need one are refused elsewhere."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from kvsharer_exp import KVPlan, apply_plan
from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.sweep_worker import WorkerLog
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY
from tests.refusals import check_refusal

LONG = (
    *("scoring=long", "scoring.prompt_tokens=96", "scoring.window_tokens=128"),
    *("heldout.window_tokens=128", "heldout.num_windows=2", "scoring.num_windows=3"),
    "scoring.report.tasks=[]",
)
PLAN = "0_1h20_2q4snap24+8_3_x_1"
NO_ROOM = [
    *("scoring=recall", "scoring.prompt_tokens=40", "scoring.window_tokens=128"),
    *("heldout.window_tokens=128", "heldout.num_windows=2", "scoring.report.tasks=[]"),
    "map=0_1_0_3_4_5",
]
SHORT = ["calibration.path=short.txt", "map=0_1_0_3_4_5", "scoring.report.tasks=[]"]


def test_evaluate_scores_the_continuation(tmp_path: Path, monkeypatch, store, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model=tiny", *LONG, *store, "evaluate", f"plan={PLAN}", "hydra.run.dir=run"]) == 0
    assert "is too small for" not in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    register(data_dir("search_spaces"))
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        config = to_config(compose("config", translate(["evaluate", "model=tiny", *LONG])))
    loaded = LoadedModel(config, WorkerLog())
    losses = []
    with apply_plan(loaded.model, KVPlan.parse(PLAN)), torch.inference_mode():
        for window in Windows(config, loaded).held_out:
            cache = loaded.model(window[None, :96], use_cache=True).past_key_values
            logits = loaded.model(window[None, 96:], past_key_values=cache).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[97:]).item())
    expected = math.exp(sum(losses) / 2)
    assert result["scores"][HELD_OUT_PERPLEXITY] == pytest.approx(expected, rel=1e-3)
    assert result["scores"]["kl"] > 0


@pytest.mark.slow
def test_a_sweep_mixes_all_keeps(tmp_path: Path, monkeypatch, store) -> None:
    monkeypatch.chdir(tmp_path)
    actions = "search_space.options.actions=[own,q4,snap0.25+8,h0.25,q4h0.25,w4+20,read,x]"
    words = [
        "model=tiny",
        *LONG,
        *store,
        "sweep",
        actions,
        "study.n_trials=10",
        "footprint.context=96",
    ]
    assert main([*words, "hydra.run.dir=run"]) == 0
    front = json.loads((tmp_path / "run" / "result.json").read_text())["front"]
    text = " ".join(entry["plan"] for entry in front)
    assert "h0.25" in text
    shares = [entry["kv_fraction"] for entry in front]
    assert min(shares) < 0.2 < max(shares)
    by_share = sorted(front, key=lambda entry: entry["kv_fraction"])
    assert [e["scores"]["kl"] for e in by_share] == sorted(
        (e["scores"]["kl"] for e in front), reverse=True
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", f"plan={PLAN}"], "h20 is chosen when a prompt has ended"),
        (["export", f"plan={PLAN}"], "h20 is chosen when a prompt has ended"),
        (["plan", f"plan={PLAN}"], "h20 is chosen when a prompt has ended, and the block error of"),
        (
            ["plan", "plan=0_1_2_3_4_5", "compare=0_1_2_3h9_4_5"],
            "the block error of layer 3 has no",
        ),
        (["evaluate", *NO_ROOM], "scoring.prompt_tokens=40 has no room for"),
        (["export", *NO_ROOM], "scoring.prompt_tokens=40 has no room for"),
        (["evaluate", *SHORT], "text gives 0 windows of 64 tokens"),
        ([*LONG, "evaluate", *SHORT], "no window of scoring.window_tokens=128: give longer"),
        (
            ["sweep", "search_space.options.actions=[own,snap9+4,read]"],
            "snap9+4 is chosen when a prompt",
        ),
        (
            [*LONG, "evaluate", f"plan={PLAN}", "scoring.report.tasks=[wiki_next]"],
            "task wiki_next has no prompt: give tasks that are answered, like copying",
        ),
        (
            [*LONG, "evaluate", "scoring.prompt_tokens=127", f"plan={PLAN}"],
            "scoring.window_tokens=128: give at least 129, two more than scoring",
        ),
        (
            [*LONG, "evaluate", "scoring.prompt_tokens=0"],
            "prompt_tokens=0: give at least 1",
        ),
        (
            [*LONG, "sweep", "search_space.options.actions=[own,h60,read]"],
            "h60 holds most of the 96 tokens that are scored",
        ),
    ],
)
def test_refusals_come_before_a_run_starts(
    words, message: str, tmp_path: Path, monkeypatch, store, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunLog, "start", None)
    (tmp_path / "short.txt").write_text("A text of one line.")
    assert main(["model=tiny", *store, "--quiet", "hydra.run.dir=run", *words]) == 2
    check_refusal(capfd.readouterr().err, message)


def test_recall_windows_ask_for_planted_facts() -> None:
    register(data_dir("search_spaces"))
    words = ["sweep", "model=tiny", "scoring=recall", "scoring.num_windows=2"]
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        config = to_config(compose("config", translate(words)))
    loaded = LoadedModel(config, WorkerLog())
    found = Windows(config, loaded).scoring
    assert found.shape == (2, 2048)
    for window in found.tolist():
        prompt, asked = (
            loaded.tokenizer.decode(part).split("The special magic number for")
            for part in (window[:1920], window[1920:])
        )
        facts = {fact.split(".")[0] for fact in prompt[1:]}
        assert {fact.split(".")[0] for fact in asked[1:-1]} <= facts and len(asked) > 2

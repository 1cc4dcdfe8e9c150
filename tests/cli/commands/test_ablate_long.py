"""``ablate`` after a long prompt: what else the bytes of a map can hold, and both together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import plans
from kvsharer_exp.cli.steps.ablation_actions import EVICTING, arm_actions, evicting
from kvsharer_exp.search.paper.arms import JOINT, PLAN_ARMS
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.keeps.h2o import H2O
from kvsharer_exp.values.keeps.snapkv import SnapKV
from kvsharer_exp.values.plan import KVPlan
from tests.refusals import check_refusal

QUICK = (
    *("model=tiny", "scoring.prompt_tokens=96", "scoring.window_tokens=128"),
    *("heldout.window_tokens=128", "footprint.context=96"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch, store) -> Callable[..., dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")

    def call(*words: str) -> dict[str, Any]:
        assert main(["ablate", *QUICK, *store, "hydra.run.dir=run", *words]) == 0
        return json.loads((tmp_path / "run" / "result.json").read_text())

    return call


def test_what_an_arm_may_do() -> None:
    """Windows hold the same shares as the other keeps, and the joint arm may do all of it."""
    single = {arm: set(arm_actions(arm, 1920)) for arm in PLAN_ARMS if arm not in EVICTING}
    assert single.pop("read") == set()
    joint = single.pop(JOINT)
    assert all(joint > actions for actions in single.values())
    assert [a.keep.held(1920) for a in arm_actions("windowed", 1920)] == [960, 480, 240, 120]
    assert [a.keep.held(1920) for a in arm_actions("snapkv", 1920)] == [960, 480, 240, 120]
    heavy = [a.keep.held(1920) for a in arm_actions("h2o", 1920)]
    assert all(0.95 * n < held < n for n, held in zip((960, 480, 240, 120), heavy, strict=True))
    quantised = {a.bits for a in joint if isinstance(a, Own) and a.keep is not None}
    assert quantised == {16, 4}


def test_a_map_whose_owners_let_go() -> None:
    plan = KVPlan.parse("0_1_0_3_1")
    every = range(5)
    assert str(evicting("map_h2o", plan, every)) == "0h0.8_1h0.8_0_3h0.8_1"
    assert str(evicting("map_pyramid", plan, every)) == "0_1snap0.8+32_0_3snap0.6+32_1"
    assert str(evicting("map_h2o", plan, {1, 2})) == "0_1h0.8_0_3_1"


@pytest.mark.slow  # a minute
def test_the_question_of_equal_memory(run) -> None:
    words = ("experiment=question_equal_memory", "compression.ratios=[0.34,0.5]")
    result = run(*words, "ablate.contexts=[64,1024]")
    by_arm = {
        (row["variant"]["footprint.context"], row["arm"], row["compression"]): row
        for row in result["rows"]
    }
    for (context, arm, ratio), row in by_arm.items():
        read = by_arm[context, "read", ratio]
        assert row["kv_fraction"] <= read["kv_fraction"] + 1e-9, arm
    for by_area in result["areas"].values():
        assert by_area["joint"] == max(by_area.values())
    kinds = {"snapkv": SnapKV, "h2o": H2O}
    for arm, kind in kinds.items():
        keeps = [a.keep for a in KVPlan.parse(by_arm[64, arm, 0.5]["plan"]).actions]
        assert any(isinstance(keep, kind) for keep in keeps)
        assert all(keep is None or isinstance(keep, kind) for keep in keeps)


def test_bytes_and_keeps_at_several_contexts(run) -> None:
    """At the longer context the same budget of bytes lets bits go further: sinks count for less."""
    words = ("ablate.arms=[read,quantised,windowed]", "compression.ratios=[0.5]")
    rows = run(*words, "scoring.fitness=kl", "ablate.contexts=[48,4096]")["rows"]
    windows = {}
    for row in (row for row in rows if row["arm"] == "windowed"):
        keeps = [a.keep for a in KVPlan.parse(row["plan"]).actions if isinstance(a, Own)]
        windows[row["variant"]["footprint.context"]] = {k.tokens for k in keeps if k is not None}
    assert windows[48] <= {24, 12, 6, 4}  # shares of the 48 tokens
    assert windows[4096] <= {48, 24, 12, 6}  # of the 96 that are read before what is scored
    kept = {(row["variant"]["footprint.context"], row["arm"]): row["kv_fraction"] for row in rows}
    assert kept[4096, "windowed"] < kept[48, "windowed"] <= 0.5
    assert kept[4096, "quantised"] < kept[48, "quantised"] <= 0.5


@pytest.mark.slow  # a minute
def test_the_combination_of_the_paper(run) -> None:
    rows = run("experiment=paper_intra", "search.threshold=-1")["rows"]
    kept = {row["arm"]: row["kv_fraction"] for row in rows}
    found = kept["dissimilar_tested"]
    assert kept["pyramid_alone"] == pytest.approx(0.8, abs=0.01)
    assert kept["map_pyramid"] == pytest.approx(0.8 * found, abs=0.01)
    assert found > kept["map_h2o"] > kept["map_pyramid"]  # the sums of h2o take bytes
    assert all(row["scores"]["kl/report"] > 0 for row in rows)


def test_without_a_prompt_they_are_refused(tmp_path: Path, monkeypatch, store, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "model=tiny", *store, "--quiet", "ablate.arms=[read,h2o]"]) == 2
    check_refusal(capfd.readouterr().err, "is chosen when a prompt has ended")

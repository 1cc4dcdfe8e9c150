"""The pieces that `Plans` is made of: stored fits, windows that overlap, words."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvsharer_exp import KVPlan
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.plans import FootprintConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.plan_words import (
    action_words,
    counted,
    memory_words,
    unseen_lines,
    unseen_words,
)
from kvsharer_exp.cli.session.stored_fits import StoredFits
from kvsharer_exp.cli.session.windows import without_runs_of
from kvsharer_exp.cli.steps.plan_candidates import mixed_reads
from kvsharer_exp.model.fitted_plan import Fit
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.footprint import Footprint


def test_of_two_that_start_together_one_makes_the_fits(tmp_path: Path) -> None:
    made, start = [], threading.Barrier(2)
    fit = Fit({"bias": torch.ones(3)})

    def work() -> None:
        start.wait()
        with StoredFits(tmp_path, {"model": "m"}, 2) as stored:
            if not stored.fits({1: [Constant()]}):
                made.append(1)
                threading.Event().wait(0.2)
                stored.keep({(1, Constant()): fit})

    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert made == [1]


def test_windows_with_a_run_in_common_are_left_out() -> None:
    windows = torch.arange(120).view(3, 40)
    others = torch.cat([torch.full((4,), 999), torch.arange(50, 66)]).view(1, 20)
    assert without_runs_of(windows, others).tolist() == windows[[0, 2]].tolist()
    nearly = torch.cat([torch.full((5,), 999), torch.arange(50, 65)]).view(1, 20)
    assert len(without_runs_of(windows, nearly)) == 3
    short = torch.arange(90, 94).view(1, 4)
    assert without_runs_of(windows, short).tolist() == windows[:2].tolist()
    assert len(without_runs_of(windows, windows[:0])) == 3


def test_halves_mix_the_sources_of_least_error() -> None:
    inf = float("inf")
    errors = [[inf] * 4, [0.1, inf, inf, inf], [0.3, 0.2, inf, inf], [0.3, 0.1, 0.2, inf]]
    found = mixed_reads(errors, 2, {2: "own"})
    assert found == {0: [], 1: [], 3: [ReadKV(1, 2), ReadKV(2, 1)]}


def test_every_action_has_words() -> None:
    plan = KVPlan.parse("0_1q4g64s4_0_0k1v_4k0v_x_c_a")
    words = [action_words(action, layer) for layer, action in enumerate(plan.actions)]
    assert words == [
        "keeps its KV",
        "keeps its KV in 4 bits, groups of 64, 4 first tokens in full",
        "reads the KV of layer 0",
        "reads keys: those of layer 0, values: those of layer 1",
        "reads keys: its own, values: those of layer 0",
        "has no attention",
        "adds a constant for its attention",
        "has an affine map for its attention",
    ]
    assert counted(plan) == "3 of 8 layers shared, 1 quantised, 3 without attention"
    assert "5 bytes of parameters more" in memory_words(plan, Footprint(10.5, 0.5, -5))
    assert "10.5 KV bytes per token (50.0% of full)" in memory_words(plan, Footprint(10.5, 0.5, 1))


def test_a_text_that_is_too_small_for_a_keep_is_told_with_its_key() -> None:
    def keys(keep: str, tokens: int = 2048, prompt: int | None = 1920) -> list[str]:
        lines = unseen_lines(KVPlan.parse(f"0_1{keep}"), "heldout.window_tokens", tokens, prompt)
        assert all(f"is too small for {keep}: all of" in line for line in lines)
        return [line.split()[0] for line in lines]

    # Tokens go while the prompt is continued.
    assert not any(map(keys, ("w4+1950", "w4+2043", "h2000", "h2046", "h0.9", "snap1919+32")))
    for keep in ("w4+2044", "h2047"):
        assert keys(keep) == ["heldout.window_tokens"]
    assert keys("snap1920+32") == ["scoring.prompt_tokens"]
    assert keys("w4+20", 24, None) == ["heldout.window_tokens"]
    assert not keys("w4+19", 24, None)
    both = KVPlan.parse("0_1w4+2044_2snap1920+32_3h9")
    assert unseen_lines(both, "heldout.window_tokens", 2048, 1920) == [
        "heldout.window_tokens is too small for w4+2044: all of 2,047 tokens are held, so nothing "
        "is saved or lost",
        "scoring.prompt_tokens is too small for snap1920+32: all of 1,920 tokens are held, so "
        "nothing is saved or lost",
    ]
    assert unseen_words(both, 1000) and not unseen_words(KVPlan.parse("0_1snap40+8"), 42, 41)


@pytest.mark.parametrize(
    ("context", "contexts", "says"),
    [
        (
            100_000,
            (),
            "footprint.context: 100,000 tokens are more than the 2,048 positions of tiny",
        ),
        (2048, (), ""),
        (
            9999,
            (512, 4096, 32_768),
            "ablate.contexts: 4,096, 32,768 tokens are more than the 2,048",
        ),
        (9999, (512, 2048), ""),
    ],
)
def test_bytes_at_a_context_beyond_the_models_positions_are_said_to_be_of_no_text(
    context: int, contexts: tuple[int, ...], says: str
) -> None:
    config = Config(
        model=ModelConfig(name="tiny", source="random:tiny"),
        footprint=FootprintConfig(context=context),
    )
    said: list[str] = []
    loaded = LoadedModel(config, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    loaded.tell_contexts(contexts)
    lines = [line for line in said if "positions" in line]
    assert len(lines) == bool(says)
    assert all(says in line and "bytes there follow from the shapes" in line for line in lines)

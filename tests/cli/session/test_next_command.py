"""The command to try next works as it stands, on the model, texts and store of this one."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.commands import sweep
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.next_command import next_command, same_command
from kvsharer_exp.model.folders import data_dir

SHARED = ("model", "calibration", "heldout", "fit", "footprint", "scoring", "seed", "tracking")
GIVEN = (
    *("model=gemma3_270m", "model.dtype=bfloat16", "footprint.context=100", "scoring=long"),
    *("calibration=news", "fit.num_windows=7", "seed=4", "heldout.path=my text.txt"),
    *("tracking.folder=else where", "tracking.experiment=1e5", "compression.kv=[0.25]"),
)


@pytest.fixture
def composed(monkeypatch) -> Iterator[Callable[..., Config]]:
    """Compose a command line, as Hydra does for the command."""
    register(data_dir("search_spaces"))
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def call(*words: str) -> Config:
        overrides = translate(words)
        made = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(made)
        return to_config(compose("config", overrides))

    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        yield call


def groups(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED}


def typed(line: str) -> list[str]:
    """What a shell makes of the line, without the name of the program."""
    program, *words = shlex.split(line)
    assert program == "kvsharer"
    return words


def test_another_command_runs_on_the_same_model_texts_and_store(composed) -> None:
    config = composed("evaluate", "plan=0_1", "--quiet", *GIVEN)
    after = composed(*typed(next_command(config, "export", "plan=0_1q4")))
    assert groups(after) == groups(config)
    assert (after.command, after.plan, after.quiet) == ("export", "0_1q4", False)
    assert after.compression.kv is None
    config = composed("evaluate", "plan=0_1", *GIVEN)
    after = composed(*typed(next_command(config, "sweep")))
    assert groups(after) == groups(config)
    assert (after.plan, after.compression.kv) == (None, [0.25])


def test_what_runs_no_model_is_given_the_store_only(composed) -> None:
    config = composed("evaluate", "plan=0_1", *GIVEN)
    words = typed(next_command(config, "reproduce", "run=x"))
    assert words[:3] == ["reproduce", "run=x", "tracking.folder=else where"]
    assert words[3:] == ["tracking.experiment='1e5'"]  # without the quotes it would be a number


def test_the_model_is_named_first_and_the_users_folders_last(composed, tmp_path) -> None:
    config = composed("evaluate", "seed=1", "plan=0_1", f"hydra.searchpath=[{tmp_path}]")
    assert next_command(config, "export", "map=0_0") == (
        f"kvsharer export model=smollm2 map=0_0 seed=1 'hydra.searchpath=[{tmp_path}]'"
    )


def next_of_sweep(config: Config, count: int, searched: float, *kept: float) -> list[str]:
    found: Any = SimpleNamespace(
        results=[None] * count, entries=[SimpleNamespace(kv_fraction=one) for one in kept]
    )
    log: Any = SimpleNamespace(folder=Path("/runs/a b"))
    return typed(sweep._next(config, log, found, searched))


def test_a_sweep_goes_on_with_what_limited_it(composed) -> None:
    words = ("sweep", "model=tiny", "search_space=layer_sources", "study.fresh=true")
    config = composed(*words, "study.n_trials=8")
    same = ["sweep", "model=tiny", "study.n_trials=16", "search_space=layer_sources"]
    assert next_of_sweep(config, 8, 60.0, 1.0) == same
    config = composed(*words, "study.minutes=2", "study.n_trials=8")
    same = ["sweep", "model=tiny", "search_space=layer_sources", "study.minutes=2"]
    assert next_of_sweep(config, 5, 100.0, 1.0) == [*same, "study.n_trials=8"]


@pytest.mark.parametrize(("kept", "share"), [((1.0, 0.4), "0.5"), ((1.0, 0.70711), "0.7072")])
@pytest.mark.parametrize("limit", ["study.n_trials=80", "study.minutes=2"])
def test_a_sweep_that_finds_nothing_more_has_a_plan_to_evaluate(
    composed, limit: str, kept: tuple[float, ...], share: str
) -> None:
    """More trials, or more minutes, would find nothing either."""
    config = composed("sweep", "model=tiny", "model.dtype=bfloat16", limit, "study.patience=9")
    assert next_of_sweep(config, 40, 20.0, *kept) == [
        *("evaluate", "model=tiny", f"plan=/runs/a b/front.json:{share}", "model.dtype=bfloat16")
    ]


def test_the_same_command_keeps_all_of_its_words_but_some(composed) -> None:
    words = ("serve", "serve.folder=a b", "serve.kv_gib=1")
    config = composed(*words, "--check", "--quiet")
    assert typed(same_command(config, without=["serve.check"])) == [
        *("serve", "model=smollm2", *words[1:])
    ]

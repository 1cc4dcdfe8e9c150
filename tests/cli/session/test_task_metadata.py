"""What ``scoring.task_metadata`` gives reaches lm-eval's tasks, and makes another study."""

from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session import scorers
from kvsharer_exp.cli.steps.sweep_setup import identity_of
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.values.errors import InputError


def config_of(*words: str) -> Config:
    register(data_dir("search_spaces"))
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        return to_config(compose("config", translate(["evaluate", "model=tiny", *words])))


@pytest.mark.parametrize(
    ("word", "given"),
    [
        (
            "scoring.task_metadata={max_seq_lengths: [4096, 8192]}",
            {"max_seq_lengths": [4096, 8192]},
        ),
        ("scoring.task_metadata={max_seq_lengths: 1k}", {"max_seq_lengths": "1k"}),
        ("scoring=wiki", {}),
    ],
)
def test_it_is_handed_to_the_tasks(word: str, given: dict[str, Any], monkeypatch) -> None:
    seen = []

    def load(names: list[str], texts: object, **options: Any) -> dict[str, Any]:
        seen.append(options["metadata"])
        return {}

    monkeypatch.setattr(scorers, "load_tasks", load)
    config = config_of(word)
    log, windows = SimpleNamespace(say=print), SimpleNamespace(texts=None)
    scorers.Scorers(config, log, None, windows, None).load_tasks()  # type: ignore[arg-type]
    assert seen == [given] * 2  # to those of the search and of the report
    loaded: Any = SimpleNamespace(description={})
    texts: Any = SimpleNamespace(texts=SimpleNamespace(fingerprints={}))
    assert identity_of(config, loaded, texts).get("task_metadata", {}) == given


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match=r"scoring.task_metadata=\[8192\] is no mapping: give one"):
        config_of("scoring.task_metadata=[8192]")

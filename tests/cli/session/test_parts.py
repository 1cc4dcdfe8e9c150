"""A command is given what its signature names, each part once and no other."""

from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvsharer_exp.cli.argv import COMMANDS
from kvsharer_exp.cli.config.names import WITHOUT_MODEL
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session import parts
from kvsharer_exp.cli.session.parts import PARTS, run_command


class Log:
    def __init__(self, config: Config) -> None:
        self.ended: list[Any] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.ended.append(kind)


class Windows:
    def __init__(self, config: Config, log: Log) -> None:
        self.config, self.log = config, log


def with_command(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    def load(name: str) -> ModuleType | SimpleNamespace:
        if ".commands." in name:
            return SimpleNamespace(run=run)
        return SimpleNamespace(RunLog=Log, Windows=Windows)

    monkeypatch.setattr(parts, "import_module", load)


def test_parts_are_made_once_and_the_log_ends_with_the_command(monkeypatch) -> None:
    seen = []

    def run(windows: Windows, log: Log, config: Config) -> int:
        assert windows.log is log
        assert windows.config is config
        assert not log.ended
        seen.append(log)
        return 3

    with_command(monkeypatch, run)
    assert run_command(Config(command="x")) == 3
    assert seen[0].ended == [None]


def test_the_log_is_told_of_an_error(monkeypatch) -> None:
    seen = []

    def run(log: Log) -> None:
        seen.append(log)
        raise KeyError

    with_command(monkeypatch, run)
    with pytest.raises(KeyError):
        run_command(Config(command="x"))
    assert seen[0].ended == [KeyError]


def test_a_command_that_names_no_log_opens_none(monkeypatch) -> None:
    monkeypatch.setattr(Log, "__init__", lambda self, config: pytest.fail("a log was made"))
    with_command(monkeypatch, lambda config: None)
    assert run_command(Config(command="x")) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_parts_that_exist(command: str) -> None:
    run = parts.import_module(f"kvsharer_exp.cli.commands.{command}").run
    named = set(signature(run).parameters)
    assert named <= {"config", *PARTS}
    assert ("loaded" in named) == (command not in WITHOUT_MODEL)


def test_every_file_of_the_folder_is_a_command() -> None:
    folder = Path(parts.__file__).parents[1] / "commands"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(COMMANDS)

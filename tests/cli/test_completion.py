"""Completion in the shells themselves, without this package at work when TAB is pressed."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from kvsharer_exp.cli.argv import COMMANDS
from kvsharer_exp.cli.completion import groups, script
from kvsharer_exp.cli.main import main

# What is typed → what TAB offers, whole words.
TYPED = {
    "kvsharer sw": {"sweep"},
    "kvsharer model=tiny sw": {"sweep"},
    "kvsharer sweep model=sm": {"model=smollm2"},
    "kvsharer sweep search_space=rank": {"search_space=ranked_pairs"},
    "kvsharer sweep study.n_": {"study.n_trials="},
    "kvsharer completion ": {"bash", "zsh", "fish"},
    "kvsharer --q": {"--quiet"},
    "kvsharer evaluate map=my": {"map=my.json"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.json").touch()
    for shell in ("bash", "zsh", "fish"):
        (tmp_path / f"completion.{shell}").write_text(script([shell], COMMANDS), encoding="utf-8")
    return tmp_path


def run(*command: str, cwd: Path) -> str:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_every_word_is_in_the_script(capsys) -> None:
    assert main(["completion", "bash"]) == 0
    words = set(capsys.readouterr().out.replace('"', " ").split())
    assert {*COMMANDS, "completion", "--quiet", "model=", "model=mistral", "seed="} <= words
    assert {"sampler=evolution", "search_space=layer_sources", "calibration=news"} <= words
    choices = {f"{group}={name}" for group, names in groups().items() for name in names}
    assert choices <= words
    assert {"study.n_trials=", "model.source=", "scoring.report.tasks="} <= words
    assert not {"command=", "study=", "search_space.options=", "sampler.options="} & words


@pytest.mark.parametrize("breaks", ["\"'><=;|&(:", " "], ids=["usual", "no = in COMP_WORDBREAKS"])
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash(folder: Path, breaks: str) -> None:
    for typed, offered in TYPED.items():
        code = (
            'source completion.bash; COMP_WORDBREAKS="$1" COMP_LINE="$2" COMP_POINT=${#2}; '
            'complete -p kvsharer >&2; _kvsharer; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        replies = set(run("bash", "-c", code, "-", breaks, typed, cwd=folder).split())
        # Where bash breaks words at "=", it replaces only what stands behind it.
        broken = "=" in breaks or "map=" in typed
        if broken:
            offered = {w if w.endswith("=") else w.rpartition("=")[2] for w in offered}
        assert replies == offered, typed


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_takes_a_plus(folder: Path) -> None:
    code = "source completion.bash; COMP_LINE='kvsharer +sam' COMP_POINT=13; _kvsharer; "
    out = run("bash", "-c", code + 'echo "${COMPREPLY[@]}"', cwd=folder)
    assert "+sampler=" in out.split()


def test_bash_in_a_terminal(folder: Path) -> None:
    """TAB itself, in an interactive bash: the word is finished as it is typed."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    out = typed_into(["bash", "--norc", "-i"], "source completion.bash", folder)
    assert "kvsharer sweep model=smollm2 " in out


def test_zsh(folder: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    setup = "autoload -Uz compinit; compinit -u -D; source completion.zsh"
    assert "kvsharer sweep model=smollm2 " in typed_into(["zsh", "-f", "-i"], setup, folder)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish(folder: Path) -> None:
    for typed, offered in TYPED.items():
        code = "source completion.fish; complete -C $argv[1]"
        lines = run("fish", "-c", code, typed, cwd=folder).splitlines()
        assert {line.split("\t")[0] for line in lines} == offered, typed


def typed_into(shell: list[str], setup: str, folder: Path) -> str:
    """What an interactive shell shows for ``kvsharer sw``, TAB, ``model=sm``, TAB."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "dumb", "PS1": "> ", "HOME": str(folder)}
        os.execvp(shell[0], shell)
    try:
        os.write(terminal, f"{setup}; echo rea''dy\n".encode())
        wait_for(terminal, "ready")
        wait_for(terminal, "> ")
        os.write(terminal, b"kvsharer sw\t")
        shown = wait_for(terminal, "eep ")
        os.write(terminal, b"model=sm\t")
        shown += wait_for(terminal, "ollm2 ")
        shown = re.sub(r"\x1b\[\?2004[hl]|\x07", "", shown)
        return re.sub(r".\x08", "", shown)
    finally:
        os.close(terminal)  # hangs up
        os.waitpid(child, 0)


def wait_for(terminal: int, text: str, seconds: float = 20) -> str:
    """What is shown up to and with ``text``, one character at a time so that no more is taken."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 1).decode(errors="replace")
    return seen

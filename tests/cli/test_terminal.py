"""What is printed on narrow, colourless, piped and non-UTF-8 terminals, and how little if asked."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.config.commands import TrackingConfig
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.config.texts import CalibrationConfig
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session.first_run import first_run
from kvsharer_exp.cli.steps.front_lines import print_front
from kvsharer_exp.cli.terminal import TurningTable, make_console
from kvsharer_exp.model.assets import asset_path
from tests.cli.commands.test_commands import QUICK
from tests.reporting.test_report import ENTRIES, FULL

ROOT = Path(__file__).parents[2]
COLOUR = r"\x1b\[[\d;]*3\d"
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
NOT_UTF8 = {
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}


def run(*arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "kvsharer_exp", *arguments]
    environment = {**OFFLINE, "HOME": str(cwd), **settings}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120)


@pytest.mark.parametrize("locale", NOT_UTF8)
def test_help_and_an_error_in_a_locale_that_is_not_utf_8(locale: str, tmp_path: Path) -> None:
    encoding = "latin-1" if locale == "latin-1" else "ascii"
    shown = run("--help", cwd=tmp_path, **NOT_UTF8[locale])
    assert shown.returncode == 0, shown.stderr
    assert "kvsharer finds" in shown.stdout.decode(encoding)
    refused = run("sweep", "model=→…×", cwd=tmp_path, **NOT_UTF8[locale])
    assert refused.returncode == 2
    assert refused.stderr.decode(encoding).startswith("kvsharer: model '")
    assert refused.stderr.count(b"\n") == 1


def test_a_command_in_a_locale_that_is_not_utf_8(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path, **NOT_UTF8["C"])
    assert done.returncode == 0, done.stderr
    assert "smollm2" in done.stdout.decode("ascii")
    assert b"\x1b" not in done.stdout + done.stderr  # and, as it is piped, no control codes


def test_signs_that_the_encoding_lacks_are_written_in_ascii() -> None:
    code = "from kvsharer_exp.cli.terminal import *; settle_streams(); print('3 ← 0 … ×2 – → 漢')"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**OFFLINE, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert out.stdout.decode("ascii") == "3 <- 0 ... x2 - -> ?\n"


def on_a_terminal(tmp_path: Path, **settings: str) -> str:
    """What ``doctor`` writes to a terminal of 40 columns."""
    ours, theirs = pty.openpty()
    environment = {**OFFLINE, "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "40", **settings}
    child = subprocess.Popen(
        [sys.executable, "-m", "kvsharer_exp", "doctor"],
        cwd=tmp_path,
        env=environment,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # how a terminal says that nobody writes to it any more
        assert child.wait() == 0
    os.close(ours)
    return shown.decode()


def test_no_color_and_40_columns(tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path, NO_COLOR="1")
    assert not re.search(COLOUR, shown)
    text = re.sub(r"\x1b\[[\d;]*m", "", shown)
    lines = [line for line in text.splitlines() if not line.startswith(("result ", "next "))]
    assert max(map(len, lines)) <= 40
    assert {"smollm2", "ready"} <= set(text.split())
    assert "qwen25_coder_0_5b" in text  # a name to copy stays whole


ROWS = [
    ["lm_eval/wiki_cloze/perplexity", "1.234e+04", "12,345.67", "99.1% (of full)"],
    ["kl", "0", "0.0123", ""],
    ["perplexity/calibration", "18.25", "21.5", "84.9%"],
]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_table_cuts_no_number(width: int) -> None:
    table = TurningTable("score", "full cache", "shared", "retained")
    for row in ROWS:
        table.add_row(*row, end_section=row[0] == "kl")
    file = io.StringIO()
    console = Console(file=file, width=width, soft_wrap=True, highlight=False)
    console.print(table)
    shown = file.getvalue()
    words = set(re.split(r"[\s│┃]+", shown))
    for row in ROWS:
        assert set(" ".join(row[1:]).split()) <= words
    assert "…" not in shown
    if width >= 40:
        assert max(map(len, shown.splitlines())) <= width


def test_a_front_of_12_maps_at_40_columns() -> None:
    console = Console(file=io.StringIO(), width=40, soft_wrap=True)
    print_front(console, ENTRIES, FULL)
    table = [line for line in console.file.getvalue().splitlines() if " shared  " not in line]
    assert max(map(len, table)) <= 40
    words = " ".join(table).split()
    assert words.count("(97%)") == 4 * len(ENTRIES)
    assert {"wiki_cloze", "12/30", "60%", "(full)"} <= set(words)


def test_a_table_that_fits_is_framed_and_a_bracket_is_no_markup() -> None:
    table = TurningTable("name", "value")
    table.add_row("[bold]", "1")
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    assert "[bold]" in file.getvalue()
    assert "┃" in file.getvalue()


def test_colour_is_a_matter_of_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for set_, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", set_)
        console = make_console()
        with console.capture() as captured:
            console.print("[green]ok[/]")
        assert bool(re.search(COLOUR, captured.get())) == coloured


def test_nothing_moves_where_the_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI does
    assert make_console().is_terminal
    assert not make_console().is_interactive


def test_quiet_in_both_spellings() -> None:
    for flag in ("--quiet", "-q"):
        assert "quiet=true" in translate(["sweep", flag, "seed=1"])


@pytest.mark.slow
def test_quiet_leaves_the_table_and_the_path(tmp_path: Path, monkeypatch, capfd, store) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    arguments = ["search", *QUICK, *store, "compression.ratios=[0.34]", "search.threshold=-1"]
    arguments.append(f"hydra.run.dir='{tmp_path}/[bold]run'")
    assert main(arguments) == 0
    loud = capfd.readouterr().out
    assert main([*arguments, "-q"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for text in (" s  loading", "next     kvsharer", "mlflow   http", "s  ranked"):
        assert text in loud
        assert text not in out
    assert f"result   {tmp_path}/[bold]run/result.json" in out
    assert "compression" in out
    *lines, _ = out.splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) < 12


def config(folder: Path, source: str = "wheel:smollm2", text: str = "wikipedia") -> Config:
    return Config(
        command="sweep",
        model=ModelConfig(name="m", source=source),
        calibration=CalibrationConfig(path=text),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/m/mlflow.db", folder=f"{folder}/m"),
    )


def test_a_first_run_explains_itself_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path))
    first, second = first_run(config(tmp_path))
    for text in ("first run", "smollm2 (93 MB)", "wikipedia (28 MB)", "package index", "minute"):
        assert text in first
    for text in (str(tmp_path), "KVSHARER_CACHE", "doctor"):
        assert text in second
    lines = first_run(config(tmp_path, "hub:org/some-7b", "mine.txt"))
    assert "wikipedia (28 MB)" in lines[0]  # the held-out text
    assert "org/some-7b (28,000 MB) from the model hub" in lines[1]
    for asset in ("smollm2", "wikipedia"):
        asset_path(asset).parent.mkdir(parents=True)
        asset_path(asset).touch()
    assert len(first_run(config(tmp_path))) == 1  # the store is still to be made
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mlflow.db").touch()
    assert first_run(config(tmp_path)) == []


@pytest.mark.parametrize("flags", [[], ["-q"]])
def test_it_is_printed_before_anything_is_fetched(
    flags: list[str], tmp_path: Path, monkeypatch, capfd, store
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["calibrate", *flags, *store]) == 2
    out, err = capfd.readouterr()
    assert ("first run: downloads smollm2 (93 MB)" in out) == (not flags)
    assert "pip could not download" in err

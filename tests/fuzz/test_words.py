"""Any words on the command line make a configuration or one clear line, and touch no file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsharer_exp.cli.argv import COMMANDS, translate
from kvsharer_exp.cli.config.compose import register, to_config, to_yaml
from kvsharer_exp.cli.config.schema import config_keys
from kvsharer_exp.cli.error_line import error_line, is_bad_input
from kvsharer_exp.cli.main import main
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.values.errors import InputError
from tests.fuzz.mutations import damaged_bytes, read_or_refused, sizes
from tests.refusals import check_refusal

REAL = [
    *("executor=processes", "executor.num_workers=2", "model=tiny", "study.n_trials=12"),
    *("scoring.search.tasks=[a,b]", "map=[0,1,0]", "plan=0_1q4_0_a", "compression.kv=[0.25,0.5]"),
    *("study.storage=sqlite:///x.db", "generate.prompt='Hi, you'", "+experiment=calibration"),
    *("search_space=suffix", "sampler.options.n=3", "heldout.path=~/a.txt", "seed=1,2"),
    *("scoring.weights.kl=0.5", "executor.address=10.0.0.1:6379", "tracking.folder=a b"),
]
ODD = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "٣",
    "\udc80",
    "\ud800",
    "\0",
    "null",
    "???",
]
ODD += [
    "${",
    "${seed}",
    "${study.name}",
    "${nothing}",
    "[",
    "{a:",
    "'",
    "[[1]]",
    "{a: {b: 1}}",
    "\n",
]
ODD += ["[" * 80 + "]" * 80, "a,b", "choice(1,2)", "range(3)", "${oc.env:NOTHING}", "é" * 300, "\\"]
VALUES = st.sampled_from(ODD) | st.text(max_size=6) | st.floats().map(str) | st.integers().map(str)
KEYS = st.sampled_from(config_keys()) | st.text("abcs._+~@:-", max_size=9)
WORDS = st.one_of(
    st.builds("{}={}".format, KEYS, VALUES),
    st.sampled_from(REAL),
    st.sampled_from(REAL)
    .flatmap(lambda word: damaged_bytes(word.encode()))
    .map(lambda b: b.decode(errors="surrogateescape")),
    st.sampled_from(["-m", "--cfg", "--config-dir", "-cn", "--check", "-q", "sweep", "-", "--é"]),
    st.text(max_size=9),
)
LINES = st.lists(WORDS, min_size=1, max_size=3).flatmap(
    lambda words: st.sampled_from(list(COMMANDS)).map(lambda command: [command, *words])
)


@pytest.fixture
def conf() -> Iterator[None]:
    register(data_dir("search_spaces"))
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        yield


def overrides_of(line: list[str]) -> list[str]:
    """Hydra's words for ``line`` without flags and their values, which `compose` does not take."""
    return get_args(translate(line)).overrides


@contextmanager
def in_one_line() -> Iterator[None]:
    """Bad input in one line, as `main` says it."""
    try:
        yield
    except Exception as error:
        if not is_bad_input(error):
            raise
        raise InputError(error_line(error)) from error


@sizes(60)
def test_configurations(size: settings, conf: None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    @size
    @given(LINES)
    def check(line: list[str]) -> None:
        with read_or_refused(tmp_path), in_one_line():
            assert to_yaml(to_config(compose("config", overrides_of(line))))

    check()


@sizes(300)
def test_words(size: settings, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    @size
    @given(LINES)
    def check(line: list[str]) -> None:
        with read_or_refused(tmp_path), in_one_line():
            assert all(isinstance(word, str) for word in translate(line))

    check()


@sizes(10, 300)
def test_refused_lines(size: settings, tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole way through `main`; the last word is refused if nothing else is."""
    monkeypatch.chdir(tmp_path)

    @size
    @given(st.lists(WORDS.filter(lambda word: word[:1] != "-"), max_size=2))
    def check(words: list[str]) -> None:
        assert main(["sweep", *words, "hydra.run.dir=run", "executor.name=process"]) == 2
        check_refusal(capsys.readouterr().err, "")

    check()

"""Text on the command line arrives as it was typed, whatever Hydra's grammar makes of it."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.config.compose import register, to_config, to_yaml
from kvsharer_exp.cli.config.names import check_file_name, file_name
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.config.text_keys import text_keys
from kvsharer_exp.cli.main import main
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.values.errors import InputError
from tests.cli.commands.test_commands import QUICK
from tests.refusals import check_refusal

KEYS = {key: kind for key, kind in text_keys(Config).items() if key != "command"}
SINGLE = sorted(key for key, kind in KEYS.items() if not kind.several)
LISTS = sorted(key for key, kind in KEYS.items() if kind.several)
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
    st.text("a1e3.5 ${}\\'\"[](),:;=~é\n\t中_-+?!|@*%/", max_size=12),
)
IN_QUOTES = re.compile(r"""\s*('(\\.|[^'\\])*'|"(\\.|[^"\\])*")\s*""", re.DOTALL)
PARSER = OverridesParser.create()


def typed(key: str, text: str, *flags: str) -> str:
    """The override that Hydra is given for ``key=text``."""
    overrides = translate(["doctor", *flags, f"{key}={text}"])
    (found,) = [override for override in overrides if override.startswith(f"{key}=")]
    return found


def arrived(override: str) -> Any:
    """What Hydra and OmegaConf read."""
    value = PARSER.parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]


def check_arrives(key: str, text: str) -> None:
    """What is left out has a meaning that the key goes on having: Hydra's own quotes, ``null``, and
    lists and references in map=."""
    assume(not IN_QUOTES.fullmatch(text))
    assume(KEYS[key].verbatim or text.lower() != "null")
    assume(KEYS[key].only or not (text.startswith("[") or "${" in text))
    assert arrived(typed(key, text)) == text


@settings(max_examples=2000, deadline=None)
@given(key=st.sampled_from(SINGLE), text=TEXTS)
@pytest.mark.slow
def test_every_text_arrives_as_typed(key: str, text: str) -> None:
    """Public fault 11: all text keys, by the parser that Hydra uses."""
    check_arrives(key, text)


@pytest.mark.slow
@pytest.mark.parametrize("key", SINGLE)
@settings(max_examples=2000, deadline=None)
@given(text=TEXTS)
def test_every_text_arrives_at_each_key(key: str, text: str) -> None:
    check_arrives(key, text)


@settings(max_examples=500, deadline=None)
@given(key=st.sampled_from(LISTS), texts=st.lists(TEXTS, max_size=4))
@pytest.mark.slow
def test_every_text_of_a_list_arrives_as_typed(key: str, texts: list[str]) -> None:
    assume(not any(text.endswith("\\") for text in texts[:-1]))  # "\\," is Hydra's for a comma
    for text in texts:
        assume("," not in text and text == text.strip() and text and text.lower() != "null")
        assume(not text.startswith(("'", '"')))  # Hydra's quotes
        assume(KEYS[key].only or not (text.startswith("[") or "${" in text))
    assert arrived(typed(key, f"[{','.join(texts)}]")) == texts


@settings(max_examples=500, deadline=None)
@given(key=st.sampled_from(SINGLE), text=TEXTS, quote=st.sampled_from(list(Quote)))
def test_text_in_quotes_of_hydra_stays_as_it_is(key: str, text: str, quote: Quote) -> None:
    quoted = QuotedString(text, quote).with_quotes()
    assert typed(key, quoted) == f"{key}={quoted}"


PROMPTS = (
    *("Hello, my name is", "Really?", "don't", "Hi!", "café", "你好", "f(x) = (1)", "[1, 2]"),
    *(
        "1e3",
        "true",
        "3.10",
        "007",
        "null",
        "???",
        "a ${seed} ${x}",
        "${",
        " two\nlines\\",
        "{a: b}",
    ),
)


@pytest.fixture
def composer() -> Any:
    register(data_dir("search_spaces"))
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        yield lambda *words: to_config(compose("config", translate(["doctor", *words])))


@pytest.mark.parametrize("section", ["generate", "study"])
def test_a_missing_section_has_its_defaults(section: str, composer) -> None:
    """``generate=???`` ended in an AttributeError, which the fuzz tests found."""
    assert composer("model=tiny", f"{section}=???") == composer("model=tiny")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_the_whole_way(prompt: str, composer) -> None:
    """Public fault 11: also through the composed configuration, and through the recorded one."""
    config = composer("model=tiny", f"generate.prompt={prompt}")
    assert config.generate.prompt == prompt
    if prompt != "???":  # which YAML takes for a missing value
        assert to_config(OmegaConf.create(to_yaml(config))) == config


@pytest.mark.parametrize("path", ["a, b/é (1).txt", "[x]=1.txt", "~/é (1).txt", "~", "~no-such/x"])
def test_every_path_arrives_the_whole_way(path: str, composer) -> None:
    """Public faults 11 and 12: unchanged but for the home folder, whatever the key is."""
    single = [
        key
        for key in SINGLE
        if KEYS[key].path
        and key != "generate.file"  # excludes generate.prompt
        and (KEYS[key].only or path[0] != "[")  # a list has a meaning there
    ]
    config = composer("model=tiny", *[f"{key}={path}" for key in single])
    expected = os.path.expanduser(path)
    assert {key: value_of(config, key) for key in single} == dict.fromkeys(single, expected)
    if "," not in path:
        several = [key for key in LISTS if KEYS[key].path and (KEYS[key].only or path[0] != "[")]
        config = composer("model=tiny", *[f"{key}=[{path},x]" for key in several])
        assert {key: value_of(config, key) for key in several} == {
            key: [expected, "x"] for key in several
        }


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("words", "override"),
    [
        ("map=[0,1,0,3]", "map=[0,1,0,3]"),
        ("map=0_1_0_3", "map=0_1_0_3"),
        ("map=~/a b.json", "map='~/a b.json'"),
        ("run=a b,c (1),1e5", "run=[a b,'c (1)','1e5']"),
        ("run=[a,'b, c']", "run=[a,'b, c']"),
        ("run=[[a b]]", "run=[[a b]]"),
        ("study.name=null", "study.name=null"),
        ("study.name=${model.name}-${seed}", "study.name=${model.name}-${seed}"),
        ("tracking.folder=${oc.env:SCRATCH}/runs", "tracking.folder=${oc.env:SCRATCH}/runs"),
        ("tracking.folder=(b)/${seed}", "tracking.folder='(b)/${seed}'"),
        ("export.path=a=b", "export.path='a=b'"),
        ("scoring.report.tasks=[]", "scoring.report.tasks=[]"),
        ("seed=1e5", "seed=1e5"),
        ("scoring.fitness={kl: 1}", "scoring.fitness={kl: 1}"),
        (
            "hydra.run.dir=~/runs (1)/${now:%H}",
            f"hydra.run.dir='{Path.home()}/runs (1)/${{now:%H}}'",
        ),
    ],
)
def test_what_hydra_is_given(words: str, override: str) -> None:
    assert override in translate(["report", words])


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("generate.prompt=a b,c (1),'d, e',1e3", ["a b", "c (1)", "d, e", "1e3"]),
        ("generate.prompt=a\\,b,c", ["a,b", "c"]),
        ("model.name=a,b", ["a", "b"]),
        ("map=0_1_0_3,[0,0,2,3]", ["0_1_0_3", [0, 0, 2, 3]]),
        ("run=é,1148e184", ["é", "1148e184"]),
        ("run=[é,a],[b]", [["é", "a"], ["b"]]),
        ("ablate.calibration_paths=[a b.txt],[news]", [["a b.txt"], ["news"]]),
        ("calibration.path=choice(a.txt,b.txt)", ["a.txt", "b.txt"]),
        ("seed=1,2", [1, 2]),
    ],
)
def test_with_m_commas_stand_between_values(words: str, values: Sequence[Any]) -> None:
    key = words.partition("=")[0]
    for flag in ("-m", "--multirun", "hydra.mode=MULTIRUN"):
        (override,) = [o for o in translate(["doctor", flag, words]) if o.startswith(f"{key}=")]
        parsed = PARSER.parse_override(override)
        held = [getattr(value, "text", value) for value in parsed.sweep_iterator()]
        assert [
            [getattr(one, "text", one) for one in value] if isinstance(value, list) else value
            for value in held
        ] == values


def test_no_field_of_text_is_forgotten() -> None:
    """A field of any type has to say whether it takes text, and a path has to say so."""
    unmarked, unsaid = [], []

    def walk(group: type, prefix: str = "") -> None:
        types = get_type_hints(group)
        said = dict(
            re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", group.__doc__ or "", re.MULTILINE)
        )
        for item in fields(group):
            key = prefix + item.name
            if is_dataclass(types[item.name]):
                walk(types[item.name], f"{key}.")
            elif types[item.name] is Any and not item.metadata:
                unmarked.append(key)
            elif (
                key in KEYS
                and not KEYS[key].path
                and re.search(r"\b(file|folder|path|URL|store)\b", said.get(item.name, ""))
            ):
                unsaid.append(key)

    walk(Config)
    assert unmarked == ["scoring.fitness", "scoring.task_metadata"]  # weights and values by name
    # Their sentences name a file, but not as their value.
    others = ["model.name", "search_space.kind", "sampler.kind", "tracking.experiment"]
    assert unsaid == [*others, "generate.prompt"]


def test_text_is_read_as_utf8_in_any_locale() -> None:
    given = "generate.prompt=café".encode().decode("ascii", errors="surrogateescape")
    assert "generate.prompt='café'" in translate(["generate", given])


def test_what_is_not_utf8_is_refused(capsys) -> None:
    assert main(["generate", "generate.prompt=\udcff"]) == 2
    check_refusal(capsys.readouterr().err, "generate.prompt")


@pytest.mark.slow
def test_no_folder_is_named_tilde(tmp_path: Path, monkeypatch, capfd, store) -> None:
    """Public fault 12: commands that write wherever they can, all of it below the home folder."""
    home, work = tmp_path / "home (1) é", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("KVSHARER_CACHE", str(Path("~/.cache/kvsharer_exp").expanduser()))
    monkeypatch.setenv("HOME", str(home))
    places = [store[0], "tracking.folder=~/store", "study.storage=~/study.journal"]
    words = [*QUICK, *places, "tracking.experiment=tests of home", "study.n_trials=2"]
    assert main(["sweep", *words, "hydra.run.dir=~/run"]) == 0
    assert {path.name for path in home.iterdir()} >= {"store", "study.journal", "run"}
    written = [path for path in (home / "store").rglob("front.json")]
    assert len(written) == 1  # the artifacts
    (shared, *_) = json.loads((home / "run" / "result.json").read_text())["front"]
    given = f"map=~/run/front.json:{shared['num_shared']}"
    export = ["export", given, "export.path=~/out", "hydra.run.dir=~/second"]
    assert main([*export, *QUICK, *places]) == 0
    assert (home / "out" / "config.json").is_file()
    assert main(["report", "run=~/run,~/second", *places, "hydra.run.dir=~/third"]) == 2
    assert "is of kind 'export'" in capfd.readouterr().err  # it was found
    assert not list(work.iterdir())


def test_the_home_folder_in_an_address(composer) -> None:
    config = composer(
        "model=tiny", "tracking.uri=sqlite:///~/a/b.db", "study.storage=sqlite:///~/c.db"
    )
    assert config.tracking.uri == f"sqlite:///{Path.home()}/a/b.db"
    assert config.study.storage == f"sqlite:///{Path.home()}/c.db"


@pytest.mark.parametrize(
    "name",
    ["a/b", "/tmp/x", "..", ".", "", "two\nlines", "x" * 300, "é" * 100, "nul\0"],
)
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    """Public fault 13: one rule for every name that becomes part of a file's name."""
    with pytest.raises(InputError, match="give") as error:
        check_file_name("study.name", name)
    assert str(error.value).startswith("study.name=")
    assert len(str(error.value)) <= 200
    assert "/" not in file_name(name)


@pytest.mark.parametrize("name", ["mistral", "Qwen 3 (é)", "你好", "1e3", "~", "👩‍🚀"])
def test_any_other_name_is_taken(name: str) -> None:
    check_file_name("study.name", name)
    assert file_name(name) == name


@pytest.mark.parametrize(
    ("words", "prefix"),
    [
        ("status", ""),
        ("report run=x", ""),
        ("plan run=x", ""),
        ("plan compression.kv=[0.25]", "smollm2-"),  # the newest sweep of this model
        ("plan plan=0_1", "smollm2-"),
        ("sweep compression.kv=[0.25]", "smollm2-"),
        ("evaluate model=tiny model.name=a/b", "a_b-"),
    ],
)
def test_a_run_folder_names_a_model_only_if_the_command_uses_it(words: str, prefix: str) -> None:
    register(data_dir("search_spaces"))
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        composed = compose("config", translate(words.split()), return_hydra_config=True)
    folder, _, name = composed.hydra.run.dir.rpartition("/")
    assert folder == f"outputs/{words.split()[0]}"
    assert re.fullmatch(rf"{prefix}\d{{4}}-[\d_-]+", name)


@pytest.mark.parametrize("key", ["model.name", "study.name", "tracking.experiment"])
@pytest.mark.parametrize("name", ["../../a/b", "x" * 300])
def test_names_are_refused_at_the_start(
    key: str, name: str, tmp_path: Path, monkeypatch, capfd, store
) -> None:
    """Public fault 13: before anything is written."""
    work = tmp_path / "one" / "two"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    assert main(["sweep", *QUICK, *store, f"{key}={name}"]) == 2
    check_refusal(capfd.readouterr().err, key)
    assert [path.name for path in tmp_path.rglob("*")] == ["one", "two"]


def test_a_server_may_have_experiments_with_a_slash(composer) -> None:
    words = ["tracking.uri=http://example.org", "tracking.experiment=/Users/me/kv"]
    assert composer("model=tiny", *words).tracking.experiment == "/Users/me/kv"

"""Groups of the user's own: found, listed and completed; a file given by its path names the way."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvsharer_exp.cli.argv import COMMANDS, translate, user_folders
from kvsharer_exp.cli.completion import script
from kvsharer_exp.cli.config.groups import groups
from kvsharer_exp.cli.main import main
from kvsharer_exp.values.errors import InputError
from tests.cli.commands.test_commands import QUICK
from tests.refusals import check_refusal

EXAMPLE = Path(__file__).parents[1] / "plugin_example"
ABLATION = "# @package _global_\nablate: {name: own, arms: [dissimilar_tested], draws: 1}\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a model and an experiment; its name needs quotes in Hydra's grammar."""
    folder = tmp_path / "é (1)"
    for group, text in (("model", "name: mine\nsource: random:tiny\n"), ("experiment", ABLATION)):
        (folder / group).mkdir(parents=True)
        (folder / group / "mine.yaml").write_text(text)
    return folder


def ways(folder: Path) -> list[list[str]]:
    """Every way to name the folder, from its parent."""
    searched = [f"file://{folder}", str(folder), folder.name]
    flags = [["--config-dir", folder.name], [f"--config-dir={folder}"], ["-cd", str(folder)]]
    return [*flags, *[[f"hydra.searchpath=[{entry}]"] for entry in searched]]


@pytest.mark.slow
@pytest.mark.parametrize("way", range(6))
def test_a_model_and_an_experiment_of_ones_own(
    way: int, own: Path, tmp_path: Path, monkeypatch, store
) -> None:
    """Public fault 14."""
    monkeypatch.chdir(tmp_path)
    chosen = [*ways(own)[way], "model=mine", f"hydra.run.dir={tmp_path}/run"]
    quick = [word for word in QUICK if word != "model=tiny"]
    ablate = ["ablate", "experiment=mine", "compression.ratios=[0.34]"]
    command = ["calibrate"] if way else ablate
    assert main([*command, *chosen, *quick, *store]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["model"]["id"] == "random:tiny"
    if not way:
        assert result["experiment"] == "own"


def test_they_are_listed_and_completed(own: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Public fault 14: ``--help`` and TAB know them, and so does a typing error."""
    monkeypatch.chdir(tmp_path)
    for way in ways(own):
        assert main(["--help", *way]) == 0
        shown = capsys.readouterr().out
        assert ", llama3_1_8b, mine, mistral, " in shown
        assert "experiment: mine, paper_calibration_set, " in shown
        assert main(["completion", "bash", *way]) == 0
        assert {"model=mine", "experiment=mine", "model=mistral"} <= set(
            capsys.readouterr().out.replace('"', " ").split()
        )
        with pytest.raises(InputError, match="'min' is unknown: did you mean mine"):
            translate(["sweep", *way, "model=min"])
    assert main(["--help", "--config-dir", str(own), "model=mine"]) == 0
    assert "  name: mine\n" in capsys.readouterr().out
    assert "mine" not in groups()["model"]


def test_doctor_looks_at_them(own: Path, tmp_path: Path, monkeypatch) -> None:
    """Also at a file that is no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (("keys", "nam: x"), ("five", "5"), ("yaml", ": : [")):
        (own / "model" / f"{name}.yaml").write_text(text)
    assert main(["doctor", "model=tiny", "--config-dir", str(own), "hydra.run.dir=run"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    notes = {check["what"]: (check["works"], check["note"]) for check in result["models"]}
    assert notes["mine"] == (True, "ready")
    for name in ("keys", "five", "yaml"):
        assert notes[name][1].startswith(f"model/{name}.yaml is no model: ")
        assert notes[name][0] is False


def test_groups_of_a_package(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    found = groups(["pkg://plugin_example.conf", "pkg://no.such.package", "file:///nowhere"])
    assert {"window", "layer_sources"} <= set(found["search_space"])
    assert {"front_mix", "tpe"} <= set(found["sampler"])


def test_words_that_name_folders_are_told_from_the_others() -> None:
    words = ["bash", "-cd", "a", "--config-dir=~/b", "hydra.searchpath=[c d,pkg://e]", "-m"]
    folders, others = user_folders(words)
    assert folders == ["a", str(Path.home() / "b"), "c d", "pkg://e"]
    assert others == ["bash", "-m"]


def test_a_name_that_a_shell_would_split_is_not_completed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("good", "two words", "$(rm)"):
        (tmp_path / "model" / f"{name}.yaml").touch()
    text = script(["bash", "--config-dir", str(tmp_path)], COMMANDS)
    assert "model=good" in text
    assert "two words" not in text
    assert "$(rm)" not in text


PATHS = {
    "calibration=/x/my.yaml": "put it at DIR/calibration/my.yaml, give --config-dir DIR calibr",
    "model=./mine.yaml": "put it at DIR/model/mine.yaml, give --config-dir DIR model=mine",
    "+model=./tiny.yaml": "put it at DIR/model/my_tiny.yaml, give --config-dir DIR model=my_tiny",
    "model=conf2/model/mine.yaml": "give --config-dir conf2 model=mine",
    "sampler=mine.yml": "put it at DIR/sampler/mine.yaml, give --config-dir DIR sampler=mine",
    "experiment=~/experiment/mine.yaml": "give --config-dir ~ experiment=mine",
    "search_space=../x.yaml": "put it at DIR/search_space/x.yaml, give --config-dir DIR search_",
    "calibration=/x/my.txt": "give calibration.path=/x/my.txt",
    "calibration=hub:some/text": "give calibration.path=hub:some/text",
    "model=Qwen/Qwen3-0.6B": "give model.source=Qwen/Qwen3-0.6B",
    "model=my.gguf": "give model.source=my.gguf",
    "model=tiny.yaml": "did you mean tiny?",
    f"model={'long/' * 60}mine.yaml": "--config-dir DIR model=mine",
    f"search_space=/x/{'y' * 80}.yaml": "DIR/search_space/NAME.yaml, give --config-dir DIR search_",
    f"model={'long/' * 20}weights": "give model.source=PLACE",
    f"model={'long/' * 8}weights": f"give model.source={'long/' * 8}weights",
}


@pytest.mark.parametrize("word", PATHS, ids=lambda word: word[:40])
def test_a_group_given_by_path_names_the_way(word: str, capsys) -> None:
    """Public fault 16."""
    assert main(["evaluate", word]) == 2
    check_refusal(capsys.readouterr().err, PATHS[word])


@pytest.mark.parametrize("folder", ["my own", "x" * 90, "elsewhere"])
def test_the_way_works(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public fault 16: what the line advises is done word for word. The path of a folder that is
    too long for the line is not given shortened, for that would be another folder."""
    monkeypatch.chdir(tmp_path)
    file = Path(folder, "" if folder == "elsewhere" else "calibration", "my.yaml")
    file.parent.mkdir(parents=True)
    file.write_text("path: news\nnum_windows: 7\n")
    with pytest.raises(InputError) as error:
        translate(["calibrate", f"calibration={file}"])
    advice = str(error.value).partition(": ")[2]
    if folder != "my own":
        target = Path("DIR", "calibration", "my.yaml")
        assert advice.startswith(f"put it at {target}, ")
        target.parent.mkdir(parents=True)
        file.rename(target)
    words = shlex.split(advice.rpartition("give ")[2])
    command = [sys.executable, "-m", "kvsharer_exp", "calibrate", "--cfg", "job", *words]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "path: news" in shown.stdout
    assert "num_windows: 7" in shown.stdout

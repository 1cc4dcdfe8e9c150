"""The command line as a new user meets it: one line and exit code 2 for every refusal."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args

from kvsharer_exp.cli.argv import _FLAGS, COMMANDS, translate
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import loaded_model
from kvsharer_exp.values.errors import InputError
from tests.refusals import check_refusal


def test_words_and_overrides_in_any_order() -> None:
    same = [
        ["+model=smollm2", "sweep"],
        ["sweep", "model=smollm2"],
        ["sweep"],
    ]
    assert {tuple(sorted(translate(arguments))) for arguments in same} == {
        ("+model=smollm2", "command=sweep")
    }


def test_flags_go_first_with_their_values() -> None:
    translated = translate(["sweep", "--cfg", "job", "seed=1", "-m"])
    assert translated == ["--cfg", "job", "-m", "command=sweep", "seed=1", "+model=smollm2"]


@pytest.mark.parametrize(
    ("words", "override"),
    [
        ("run=1148e184", "run='1148e184'"),
        ("run=5b90,1e5", "run=[5b90,'1e5']"),
        ("map=1148e999", "map='1148e999'"),
        ("map=[0,1,0,3]", "map=[0,1,0,3]"),
        ("run=runs/1e5", "run=runs/1e5"),
        ("run='1e5'", "run='1e5'"),
        ("seed=1e5", "seed=1e5"),
    ],
)
def test_ids_that_look_like_numbers_stay_text(words: str, override: str) -> None:
    """To Hydra ``1148e184`` is 1.148e+187, and the id cannot be read back from that."""
    assert override in translate(["report", words])


def test_help_needs_no_command() -> None:
    assert translate(["--help"]) == ["--help", "+model=smollm2"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no command given: choose one of"),
        (["swep"], "command 'swep' is unknown: did you mean sweep?"),
        (["sweep", "search"], "two commands given"),
        (["sweep", "model=mistrall"], "model 'mistrall' is unknown: did you mean mistral?"),
        (["sweep", "+model=xyz123"], "model 'xyz123' is unknown: choose one of"),
        # Found by ten thousand examples of tests/fuzz.
        (["sweep", "sampler=5"], "sampler '5' is unknown: choose one of beam"),
        (["sweep", "scoring=[1,wiki]"], "scoring '[1,wiki]' is unknown: did you mean wiki?"),
        (["sweep", "--config-dir", "-m"], "--config-dir needs a value: see --help"),
        (["sweep", "--multirun="], "--multirun takes no value: leave out '--multirun='"),
        (["sweep", "--cfg="], "--cfg '' is unknown: choose one of job, hydra, all"),
        (["sweep", "executor@a=1"], "executor '1' is unknown: choose one of local"),
        (["sweep", "~executor=5"], "executor '5' is unknown: choose one of local"),
        (["sweep", "hydra=5"], "hydra '5' is unknown: see --help"),
        (["sweep", "+@a=1"], "'+@a=1' has no key: give key=value"),
        (["sweep", "=1"], "'=1' has no key: give key=value"),
        (["sweep", "hydra/launcher=null"], "hydra/launcher 'null' is unknown: see --help"),
        (["sweep", "seed=" + "9" * 5000], "seed is given a number of thousands of digits: give a"),
    ],
)
def test_refused_before_hydra(arguments: list[str], reason: str) -> None:
    with pytest.raises(InputError) as refused:
        translate(arguments)
    assert str(refused.value).startswith(reason)


@pytest.mark.parametrize("flag", _FLAGS)
def test_what_passes_is_read_by_hydra(flag: str) -> None:
    """Its parser would end the process with lines of its own."""
    values = ("", "x", "-x", "-", "--", "job", "a b")
    lines = [[flag], *([f"{flag}={value}"] for value in values), *([flag, v] for v in values)]
    read = 0
    for line in lines:
        try:
            words = translate(["calibrate", *line])
        except InputError:
            continue
        assert get_args(words).overrides[-1:] == ["+model=smollm2"]
        read += 1
    assert read or flag in ("--info", "-i", "--check")  # these take other words


REFUSALS = {
    "sweep.typo=1": "sweep is not a key",
    "+sweep.typo=1": "sweep is not a key",
    "calibration.num_window=3": "num_window",
    "+study.n_trial=3": "did you mean study.n_trials?",
    "study.n_trials=-1": "study.n_trials=-1: give at least 1",
    "study.n_trials=many": "study.n_trials",
    "study.minutes=nan": "study.minutes=nan: give a finite number",
    "study.margin=inf": "study.margin=inf: give a finite number",
    "sampler.options.explore=nan": "sampler.options.explore=nan: give a finite number",
    "seed=x": "seed",
    "calibration.path=missing.txt": "missing.txt",
    "calibration.distance=euclidean": "calibration.distance=euclidean is unknown",
    "search_space=rank_pairs": "did you mean ranked_pairs?",
    "search_space=nope": "choose one of blocks, greedy_knobs, joint_actions, layer_actions, ",
    "sampler.options.elite=2": "give it as +sampler.options.elite=",
    "+sampler.options.elite=2": "evolution does not take these options",
    "sampler=tpee": "sampler 'tpee' is unknown: did you mean tpe?",
    "compression.ratios=[]": "compression.ratios is empty",
    "compression.kv=[]": "compression.kv=[] is empty: give at least one share, like [0.25]",
    "compression.kv=[0]": "compression.kv=0: give shares above 0, at most 1",
    "compression.ratios=[1.5]": "compression.ratios=1.5",
    "compression.ratios=[0.01]": "compression 0.01 asks for 0 of",
    "search.threshold=3": "search.threshold=3",
    "scoring.num_windows=0": "scoring.num_windows=0: give at least 1",
    "scoring.window_tokens=1": "scoring.window_tokens=1: give at least 2",
    "model.dtype=float99": "float99",
    "scoring.report.tasks=[wiki_clozee]": "did you mean wiki_cloze",
    "scoring.report.tasks=[wiki_cloze_search]": "wiki_cloze_search",
    "tracking.uri=sqlite:////proc/nope/x.db": "tracking",
    f"model.source=/{'m' * 300}": "mmm/config.json is too long for a path: give a shorter one",
    f"hydra.searchpath=[/{'m' * 300}]": "is too long for a path",
    f"hydra.run.dir=/{'m' * 300}": "is too long for a path",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_bad_input_is_one_line_and_exit_code_2(
    override: str, tmp_path: Path, monkeypatch, capfd, store
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "model=tiny", f"hydra.run.dir={tmp_path}/run", *store, override]
    assert main(arguments) == 2
    check_refusal(capfd.readouterr().err, REFUSALS[override])
    assert not (tmp_path / "run" / "result.json").exists()


EARLY = {
    "study.storage=nonsense://x": "nonsense://… is no database that can be opened here",
    "study.storage=mysql://host/x": "mysql://… needs the driver mysqldb: install it",
    "tracking.uri=foo://bar": "foo://bar cannot be opened (no kind of store has such an address)",
    "tracking.folder=/proc/nope": "tracking.folder=/proc/nope cannot be written (No such file",
    "hydra.run.dir=/proc/nope": "the run folder /proc/nope cannot be made (No such file or",
    "scoring.fitness=[kl]": "scoring.fitness=['kl'] is unknown: choose one of kl,",
    "search_space.options.actions=[own,foo]": "foo is no action of layer 0: give own, q4",
    "+search_space.options.fixed={1:foo}": "foo is no action of layer 1: give own, q4",
    "+search_space.options.fixed=[own]": "fixed=['own']: give layers and what they do, like",
    "fit.sequential=true": "fit.sequential=true fits the stand-ins of one plan in order, and a swe",
    "study.screen_windows=[5,24]": "study.screen_windows=[5, 24]: give numbers below scoring.num_w",
}


@pytest.mark.parametrize("override", EARLY)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    override: str, tmp_path: Path, monkeypatch, capfd, store
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loaded_model, "load", lambda spec: pytest.fail("a model is loaded"))
    words = ["sweep", "model=tiny", f"hydra.run.dir={tmp_path}/run", *store]
    words = [word for word in words if word.partition("=")[0] != override.partition("=")[0]]
    assert main([*words, override]) == 2
    check_refusal(capfd.readouterr().err, EARLY[override])
    assert not (tmp_path / "run").exists()


ID = "f" * 32
NO_STORE = (
    "MLflow store sqlite:///mlruns/mlflow.db does not exist, so it has no runs: run a command"
)
UNKNOWN = {
    f"evaluate plan={ID}": NO_STORE,
    f"bench map={ID}:4": NO_STORE,
    f"export map={ID}": NO_STORE,
    f"generate plan={ID}:0.25 generate.prompt=Hello": NO_STORE,
    f"ablate map={ID}": NO_STORE,
    f"plan plan=0_1_2_3_4_5 compare={ID}": NO_STORE,
    f"plan run={ID}": NO_STORE,
    "plan compression.kv=[0.25]": NO_STORE,
    f"report run={ID}": NO_STORE,
    f"reproduce run={ID}": NO_STORE,
    f"evaluate run={ID}": f"evaluate knows no run={ID}: give plan= to name the plan of a run",
}


@pytest.mark.parametrize("line", UNKNOWN, ids=lambda line: line.replace(ID, "ID"))
def test_a_run_that_is_not_there_is_looked_up_without_making_a_store(
    line: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), "--quiet"]) == 2
    check_refusal(capfd.readouterr().err, UNKNOWN[line])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv", ["compression.kv=[0.25]", "compression.kv_gib=1"])
def test_budgets_of_bytes_in_a_search_of_maps_are_refused(kv, tmp_path, monkeypatch, capfd) -> None:
    """They were ignored."""
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "model=tiny", "search_space=layer_sources", kv]) == 2
    says = "compression.kv sets budgets of plans, and search_space=layer_sources holds sharing maps"
    check_refusal(capfd.readouterr().err, says)


def test_a_refused_command_leaves_what_it_found(tmp_path: Path, monkeypatch, store) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in ("../run", "."):
        assert main(["sweep", "model=tiny", f"hydra.run.dir={folder}", *store, "seed=-1"]) == 2
    assert (tmp_path / "run" / "mine").exists()
    assert Path.cwd().exists()


def test_a_fitness_that_is_unknown_is_refused_by_every_command_that_scores(
    tmp_path: Path, monkeypatch, capfd, store
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["evaluate", "map=0_1_0_3"], ["export", "map=0_1_0_3", "export.path=out"]):
        assert main([*words, "model=tiny", *store, "scoring.fitness=foo"]) == 2
        check_refusal(capfd.readouterr().err, "scoring.fitness=foo is unknown: choose one of kl")


MAPS = {
    "0_1_2": "map has 3 layers but the model has",
    "0_x": "neither",
    "[0,1,1,1.5]": "not an integer",
    "missing.json": "cannot be read",
    "0_0_1_3": "does not own its KV",
    "[]": "empty",
    "null": "no map given",
    "f" * 32: "f" * 32,
}


@pytest.mark.parametrize("text", MAPS)
def test_a_wrong_map_is_one_line(text: str, tmp_path: Path, monkeypatch, capfd, store) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "model=tiny", *store, f"map={text}"]) == 2
    check_refusal(capfd.readouterr().err, MAPS[text])


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "model=tiny", "seed=-1", "debug=true"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_a_model_of_the_hub_stops_with_the_line_about_it(
    tmp_path: Path, monkeypatch, capfd, store
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert main(["+model=mistral", "sweep", *store]) == 2
    error = capfd.readouterr().err.strip()
    assert "mistralai/Mistral-7B-Instruct-v0.3" in error
    assert "smollm2" in error
    assert "\n" not in error


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvsharer_exp", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_lists_commands_groups_and_options(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in shown.stdout
    for text in ("mistral", "smollm2", "ranked_pairs", "layer_sources", "n_trials", "sampler"):
        assert text in shown.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["mistral", "smollm2", "llama2_70b"])
def test_every_model_composes(model: str, tmp_path: Path) -> None:
    shown = run(f"+model={model}", "sweep", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "command: sweep" in shown.stdout
    assert f"name: {model}" in shown.stdout
    assert not any(tmp_path.iterdir())


def test_looking_costs_no_heavy_import() -> None:
    """`--help` stays fast because torch, transformers and MLflow are not imported for it, and
    because Hydra opens its sources once. Counted: 404 modules, 35 of them ours, one opening."""
    code = (
        "import sys, kvsharer_exp.cli.main as cli\n"
        "from hydra._internal.config_repository import ConfigRepository\n"
        "opened, init = 0, ConfigRepository.__init__\n"
        "def counted(*given, **named):\n"
        "    global opened\n"
        "    opened += 1\n"
        "    init(*given, **named)\n"
        "ConfigRepository.__init__ = counted\n"
        "assert cli.main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'optuna', 'lm_eval', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "ours = [name for name in sys.modules if name.startswith('kvsharer_exp')]\n"
        "assert len(ours) < 40, ours\n"
        "assert len(sys.modules) < 500, len(sys.modules)\n"
        "assert opened < 10, opened"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvsharer 0.")

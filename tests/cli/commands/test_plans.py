"""`evaluate`, `generate`, `bench` and `plan` with KV plans: fits made once, kept apart, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsharer_exp import FittedPlan, KVPlan, load_plan
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import plans
from kvsharer_exp.cli.session.windows import without_runs_of
from kvsharer_exp.measure import fits as fits_module
from tests.refusals import check_refusal

PLAN = "0_1q4s4_0_x_c_a"
QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("scoring.num_windows=3", "scoring.window_tokens=32", "scoring.search.tasks=[]"),
    *("scoring.report.tasks=[]", "heldout.num_windows=2", "heldout.window_tokens=24"),
    *("fit.num_windows=6", "fit.window_tokens=40", "bench.contexts=[40]", "bench.new_tokens=2"),
    *("bench.repeats=1", "generate.prompt=Hello", "generate.max_new_tokens=3"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch, store) -> Callable[..., dict[str, Any]]:
    """Run a command in an empty folder with an empty cache; gives its ``result.json``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")

    def call(*arguments: str) -> dict[str, Any]:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        assert main([*QUICK, *store, f"hydra.run.dir={folder}", *arguments]) == 0
        return {**json.loads((folder / "result.json").read_text()), "folder": folder}

    return call


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch, store, capfd) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")

    def call(names: str, *arguments: str) -> None:
        capfd.readouterr()
        assert main([*QUICK, *store, "--quiet", *arguments]) == 2
        check_refusal(capfd.readouterr().err, names)

    return call


@pytest.fixture
def fitted(monkeypatch) -> list[dict[int, list[str]]]:
    """Grows by what is fitted, at every call that fits anything: the actions by layer."""
    calls: list[dict[int, list[str]]] = []
    inner = fits_module.fit_actions

    def counted_calls(model: Any, windows: Any, wanted: Any, **options: Any) -> Any:
        calls.append({layer: [a.name for a in actions] for layer, actions in wanted.items()})
        return inner(model, windows, wanted, **options)

    monkeypatch.setattr(fits_module, "fit_actions", counted_calls)
    monkeypatch.setattr(plans, "fit_actions", counted_calls)
    return calls


def test_every_command_takes_a_plan_and_fits_are_made_once(run, fitted, capsys) -> None:
    result = run("evaluate", f"plan={PLAN}")
    assert (result["kv_source_layers"], result["plan"], result["num_shared"]) == (None, PLAN, 1)
    assert result["digest"] == KVPlan.parse(PLAN).digest
    assert {"cosine", "kl", "perplexity/report"} <= result["scores"].keys()
    assert result["scores"]["kl"] > 0
    size = result["footprint"]
    assert (size["context"], size["kv_bytes_per_token"]) == (4096, size["kv_bytes"] / 4096)
    assert size["measured"]["cache_bytes"] > 0
    assert fitted == [{4: ["constant"], 5: ["affine"]}]
    shown = capsys.readouterr().out
    assert f"plan {PLAN}" in shown
    assert "fitting 2 stand-ins on 6 windows of 40 tokens" in shown
    result = run("generate", f"plan={PLAN}")
    answer = result["answers"][0]
    assert answer["shared"]["kv_bytes"] < answer["full"]["kv_bytes"]
    # What comes next takes the plan with its fits: its text would be fitted by other settings.
    assert f"kvsharer evaluate model=tiny plan={result['folder']}" in capsys.readouterr().out
    result = run("bench", f"plan={PLAN}", "footprint.context=100")
    (cell,) = result["cells"]
    assert cell["shared"]["kv_projection_calls"] == 0
    assert result["footprint"]["context"] == 100
    assert "attention reads -" in result["where_from"]
    assert len(fitted) == 1  # the other commands fitted nothing
    run("plan", "plan=0_1_2_c_c_a")
    assert fitted[1:] == [{3: ["constant"]}]  # only what is new


@pytest.mark.slow
def test_a_run_keeps_its_plan_and_fits_and_is_a_plan_itself(run, fitted, refuse) -> None:
    first = run("evaluate", f"plan={PLAN}")
    kept = load_plan(first["folder"])
    assert isinstance(kept, FittedPlan)
    assert str(kept.plan) == PLAN
    for value in (first["folder"], first["mlflow_run_id"]):
        again = run("evaluate", f"plan={value}")
        assert (again["plan"], again["scores"]) == (PLAN, first["scores"])
    assert load_plan(again["folder"]).keys == kept.keys  # type: ignore[union-attr]
    assert len(fitted) == 1
    # the folder's fits are not used for another model or text
    refuse("are of model", "evaluate", f"plan={first['folder']}", "model.seed=3")
    (Path("mine.txt")).write_text("\n".join(f"This is line {i} of a text." for i in range(99)))
    text = ("calibration.path=mine.txt", "fit.num_windows=2", "fit.window_tokens=16")
    refuse("are of text", "evaluate", f"plan={first['folder']}", *text)
    (first["folder"] / "fits.safetensors").write_bytes(b"broken")
    refuse("damaged", "evaluate", f"plan={first['folder']}")


@pytest.mark.slow
def test_a_map_is_a_plan_and_gives_the_same_result(run, capsys) -> None:
    results = [run("evaluate", f"{key}=0_1_0_3_4_4") for key in ("map", "plan")]
    keys = ("kv_source_layers", "plan", "digest", "num_shared", "scores", "full", "footprint")
    one, other = ({key: result[key] for key in keys} for result in results)
    assert one == other
    assert one["kv_source_layers"] == [0, 1, 0, 3, 4, 4]
    assert not (results[1]["folder"] / "fits.safetensors").exists()
    assert capsys.readouterr().out.count("2 of 6 layers shared: 1,024 KV bytes per token") == 2


@pytest.mark.slow  # several commands
def test_other_settings_are_other_fits(run, fitted) -> None:
    plan = "plan=0_1_2_3_4_c"
    run("plan", plan)
    for change in ("fit.num_windows=5", "seed=1", "model.dtype=bfloat16", "fit.window_tokens=48"):
        before = len(fitted)
        run("plan", plan, change)
        assert len(fitted) == before + 1, change
    run("plan", plan, "fit.memory_gib=0.001")  # it changes how, not what
    assert len(fitted) == 5


@pytest.mark.slow  # several commands
def test_one_after_the_other_is_kept_whole(run, fitted) -> None:
    # The second stand-in is fitted behind the first, so its numbers are others.
    first = load_plan(run("evaluate", "plan=0_1_a_3_a_5")["folder"])
    sequential = ("plan=0_1_a_3_a_5", "fit.sequential=true")
    before = len(fitted)
    second = load_plan(run("evaluate", *sequential)["folder"])
    assert len(fitted) == before + 2
    run("evaluate", *sequential)
    assert len(fitted) == before + 2
    assert isinstance(first, FittedPlan) and isinstance(second, FittedPlan)
    assert first.keys[2] == second.keys[2]
    assert first.keys[4] != second.keys[4]


@pytest.mark.slow  # several commands
def test_a_damaged_file_of_the_cache_is_made_again(run, fitted, tmp_path: Path) -> None:
    scores = run("evaluate", f"plan={PLAN}")["scores"]
    (file,) = (tmp_path / "cache").rglob("5_a.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert run("evaluate", f"plan={PLAN}")["scores"] == scores
    assert fitted[1:] == [{5: ["affine"]}]
    assert run("evaluate", f"plan={PLAN}")["scores"] == scores
    assert len(fitted) == 2


@pytest.mark.slow  # several commands
def test_a_cache_that_cannot_be_written_costs_time_only(run, fitted, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    scores = [run("evaluate", f"plan={PLAN}")["scores"] for _ in range(2)]
    assert scores[0] == scores[1]
    assert len(fitted) == 2


@pytest.mark.slow
def test_fit_windows_hold_no_text_of_scoring_windows_and_none_of_the_report(run, monkeypatch):
    seen = {}
    inner = plans.fit_actions

    def spy(model: Any, windows: torch.Tensor, wanted: Any, **options: Any) -> Any:
        seen["fit"] = windows
        return inner(model, windows, wanted, **options)

    monkeypatch.setattr(plans, "fit_actions", spy)
    init = plans.Plans.__init__

    def remember(self: Any, config: Any, log: Any, loaded: Any, windows: Any) -> None:
        seen["windows"] = windows
        init(self, config, log, loaded, windows)

    monkeypatch.setattr(plans.Plans, "__init__", remember)
    run("plan", "plan=0_1_2_3_4_c", "fit.num_windows=50", "fit.window_tokens=32")
    windows = seen["windows"]
    assert seen["fit"].shape == (50, 32)
    assert torch.equal(seen["fit"], windows.fit)
    for others in (windows.scoring, windows.held_out):
        assert len(others)
        assert len(without_runs_of(windows.fit, others)) == 50
    everything = windows._cut(windows.texts.calibration, 10**9, 32, at_most=True)
    assert len(without_runs_of(everything, windows.scoring)) < len(everything)
    assert not len(windows.beside_fits(windows.fit))


@pytest.mark.slow
def test_a_short_text_is_used_as_far_as_it_goes(run, refuse, tmp_path: Path, capfd) -> None:
    lines = [f"This is line {i} of a text of its own, {i * i} letters long." for i in range(20)]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    words = ("plan=0_1_2_3_4_a", "calibration.path=mine.txt", "fit.window_tokens=24")
    run("plan", *words)
    run("plan", *words, "fit.num_windows=96")
    assert "fit.num_windows=96 are asked" in capfd.readouterr().out
    refuse("give more text", "plan", *words, "scoring.num_windows=99", "scoring.window_tokens=24")


def test_plan_prints_layers_totals_and_differences(run, capsys) -> None:
    options = ("footprint.context=64", "footprint.batch=2")
    result = run("plan", f"plan={PLAN}", "compare=0_1q2_0_x_c_5", *options)
    layers = result["layers"]
    assert [one["text"] for one in layers] == PLAN.split("_")
    assert [one["action"] for one in layers] == [
        "own", "own", "read", "drop", "constant", "affine",
    ]  # fmt: skip
    errors = [one["block_error"] for one in layers]
    assert errors[0] == 0 < errors[1] < errors[2]
    assert result["kv_bytes"] == sum(one["kv_bytes"] for one in layers)
    assert result["kv_bytes"] == 2 * result["footprint"]["kv_bytes"]
    assert layers[0]["kv_bytes"] == 2 * 64 * 2 * 32 * 4
    saved = [one["parameter_bytes_saved"] for one in layers]
    assert sum(saved) == result["footprint"]["parameter_bytes_saved"]
    other = result["compare"]
    assert other["plan"] == "0_1q2_0_x_c_5"
    assert other["layers"][1]["block_error"] > errors[1]
    assert other["layers"][2:5] == layers[2:5]
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 sequences of 64 tokens" in shown
    more = other["kv_bytes"] - result["kv_bytes"]
    assert f"keeps {more:,} KV bytes more" in shown
    assert "differs in 2 of 6 layers" in shown
    run("plan", f"plan={PLAN}", f"compare={PLAN}")
    assert "The two plans are the same." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "keep", "line"),
    [
        ("evaluate", "w2+30", "heldout.window_tokens is too small for w2+30: all of 23 tokens"),
        ("plan", "w2+30", "scoring.window_tokens is too small for w2+30: all of 31 tokens"),
        ("bench", "w2+60", "bench.contexts=40 is too small for w2+60: all of 42 tokens"),
        ("bench", "h42", "bench.contexts=40 is too small for h42: all of 42 tokens"),
    ],
)
def test_a_keep_that_holds_all_of_the_text_is_said_to_save_nothing(
    run, capsys, command: str, keep: str, line: str
) -> None:
    run(command, f"plan=0_1{keep}_2_3_4_5")
    assert line in " ".join(capsys.readouterr().out.split())
    small = "h20" if keep[0] == "h" else "w2+9"
    run(command, f"plan=0_1{small}_2_3_4_5")
    assert "is too small for" not in " ".join(capsys.readouterr().out.split())


REFUSED = {
    "evaluate": "no map given",
    "evaluate map=0_1_0_3_4_5 plan=0_1_0_3_4_5": "both given",
    "plan": "no map given",
    "plan plan=0_1_2_3_a": "plan has 5 layers",
    "plan plan=0_1_2_3_4_z": "layer 5 has 'z'",
    "plan plan=0_1_2_3_4_5q7": "7 bits",
    "plan plan=absent.json": "absent.json",
    "plan plan=outputs/absent": "outputs/absent",
    f"plan plan={'y' * 300}": "yyy",
    f"plan plan={'a' * 32}": "is not in this store",
    "plan plan=0_1_2_3_4_5 compare=0_1_2": "map has 3 layers",
    "plan plan=0_1_2_3_4_5 fit.num_windows=1": "fit.num_windows=1",
    "plan plan=0_1_2_3_4_5 fit.window_tokens=1": "fit.window_tokens=1",
    "plan plan=0_1_2_3_4_5 fit.memory_gib=0": "fit.memory_gib=0",
    "plan plan=0_1_2_3_4_5 footprint.context=0": "footprint.context=0",
    "plan plan=0_1_2_3_4_5 footprint.batch=0": "footprint.batch=0",
    "bench plan=0_1_2_3_4_5q7": "7 bits",
    "generate plan=0_1_2_3_4_5_6": "map has 7 layers",
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[:50])
def test_what_is_no_plan_is_refused_in_a_line(refuse, line: str) -> None:
    refuse(REFUSED[line], *line.split())

"""`bench`, `export` and `generate` end to end on the tiny model, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch

from kvsharer_exp import SharingMap, load_exported, load_model, share_kv
from kvsharer_exp.cli.commands.generate import first_divergence
from kvsharer_exp.cli.main import main
from tests.cli.commands import test_commands as commands
from tests.refusals import check_refusal

run, client, QUICK = commands.run, commands.client, commands.QUICK  # run is a fixture
MAP, SOURCES = "0_1_2_1_4_4", [0, 1, 2, 1, 4, 4]
QUICK_BENCH = ("bench.new_tokens=2", "bench.repeats=2")


@pytest.mark.slow
def test_bench_measures_every_cell_beside_its_prediction(run, store, capsys) -> None:
    cells = ("bench.batch_sizes=[1,2]", "bench.contexts=[8,16]")
    result = run("bench", f"map={MAP}", *cells, *QUICK_BENCH)
    assert result["kv_source_layers"] == SOURCES
    assert [(c["batch"], c["context"]) for c in result["cells"]] == [
        (1, 8),
        (1, 16),
        (2, 8),
        (2, 16),
    ]
    per_token = result["footprint"]["kv_bytes_per_token"]
    for cell in result["cells"]:
        assert {"full", "shared", "predicted", "speedup"} <= cell.keys()
        tokens = cell["batch"] * (cell["context"] + 2)
        assert cell["shared"]["cache_bytes"] == tokens * per_token
        assert cell["predicted"]["kv_bytes"]["shared"] == tokens * per_token
        assert cell["shared"]["kv_projection_calls"] == 0 < cell["full"]["kv_projection_calls"]
        assert cell["predicted"]["kv_fraction"] == pytest.approx(4 / 6)
    assert result["where_from"].endswith("holds a 1.50 times larger batch.")
    shown = capsys.readouterr().out
    assert "DynamicCache's concatenation copies" in shown
    assert f"kvsharer export model=tiny map={MAP}" in shown
    metrics = client(store).get_run(result["mlflow_run_id"]).data.metrics
    assert metrics["batch_2/context_16/shared/cache_bytes"] == 36 * per_token


@pytest.mark.slow
def test_bench_of_the_identity_map_says_that_nothing_is_saved(run) -> None:
    result = run("bench", "map=0_1_2_3_4_5", "bench.contexts=[8]", *QUICK_BENCH)
    assert "shares no layer" in result["where_from"]


def test_bench_without_a_map_calculates(run, capsys) -> None:
    result = run("bench", "compression=paper", "bench.contexts=[10]", "bench.memory_gib=0.01")
    (cell,) = result["cells"]
    assert (cell["batch"], cell["context"]) == (1, 10)
    assert [row["compression"] for row in cell["predicted"]] == [0.125, 0.25, 0.375]
    assert [row["num_shared"] for row in cell["predicted"]] == [1, 2, 2]
    quarter = cell["predicted"][1]
    assert quarter["kv_bytes"] == {"full": 10 * 1536, "shared": 10 * 1024}
    fits = quarter["largest_batch"]
    assert fits["shared"] > fits["full"] > 0
    assert f"{fits['full']} → {fits['shared']}" in capsys.readouterr().out


def test_export_writes_a_folder_that_is_the_shared_model(run, store) -> None:
    result = run("export", f"map={MAP}")
    folder = result["folder"] / "export"
    assert result["export"]["path"] == str(folder)
    assert result["kv_source_layers"] == SOURCES
    model, tokenizer = load_exported(folder)
    original, _ = load_model("tiny", device="cpu")
    ids = tokenizer("What is exported is what was scored.", return_tensors="pt").input_ids
    with torch.inference_mode(), share_kv(original, SharingMap.parse(MAP)):
        expected = original(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)
    bytes_of = [sum(p.numel() * 4 for p in m.parameters()) for m in (original, model)]
    assert bytes_of[0] - bytes_of[1] == result["footprint"]["parameter_bytes_saved"] > 0
    card = (folder / "README.md").read_text()
    for number in (result["scores"]["kl"], result["scores"]["perplexity/report"]):
        assert f"{number:.4g}" in card
    assert MAP in card and "Licence" in card and "trust_remote_code=True" in card
    assert all(len(line) <= 200 for line in card.splitlines())
    names = {a.path for a in client(store).list_artifacts(result["mlflow_run_id"])}
    assert {"model_card.md", "result.json"} <= names


@pytest.mark.slow
def test_the_scores_of_an_export_are_those_of_evaluate(run) -> None:
    exported, evaluated = run("export", f"map={MAP}"), run("evaluate", f"map={MAP}")
    for name, value in exported["scores"].items():
        assert value == pytest.approx(evaluated["scores"][name], rel=1e-5)
    assert exported["footprint"] == evaluated["footprint"]


@pytest.mark.slow
def test_export_of_a_run_and_over_an_earlier_one(run, tmp_path: Path) -> None:
    found = run("evaluate", f"map={MAP}")["mlflow_run_id"]
    path = tmp_path / "deep" / "shipped"
    first = run("export", f"map={found}", f"export.path={path}")
    assert first["export"]["path"] == str(path)
    assert SharingMap.parse(path / "sharing_map.json") == SharingMap.parse(MAP)
    run("export", "map=0_0_2_3_4_5", f"export.path={path}", "export.overwrite=true")
    assert json.loads((path / "config.json").read_text())["kv_source_layers"][1] == 0


def test_generate_shows_both_answers(run, tmp_path: Path, capsys) -> None:
    result = run("generate", f"map={MAP}", "generate.prompt=Hello", "generate.max_new_tokens=6")
    (answer,) = result["answers"]
    full, shared = answer["full"], answer["shared"]
    assert (answer["prompt"], answer["prompt_tokens"]) == ("Hello", 5)
    held = 5 + len(full["tokens"]) - 1  # the last token is never fed back
    assert full["kv_bytes"] == held * 1536
    assert shared["kv_bytes"] == (5 + len(shared["tokens"]) - 1) * 1024
    differs = answer["first_diverging_token"]
    assert full["tokens"][:differs] == shared["tokens"][:differs]
    assert full["tokens"][differs] != shared["tokens"][differs]
    assert full["tokens_per_second"] > 0 < shared["tokens_per_second"]
    model, tokenizer = load_model("tiny", device="cpu")
    ids = tokenizer("Hello", return_tensors="pt")
    alone = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    assert full["tokens"] == alone
    assert f"number {differs} (from 0)" in capsys.readouterr().out


def test_generate_reads_a_file_and_says_when_nothing_differs(run, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("One\n\nTwo words\n", encoding="utf-8")
    same = ("map=0_1_2_3_4_5", "generate.file=prompts.txt", "generate.max_new_tokens=3")
    result = run("generate", *same)
    assert [answer["prompt"] for answer in result["answers"]] == ["One", "Two words"]
    for answer in result["answers"]:
        assert answer["first_diverging_token"] is None
        assert answer["full"]["tokens"] == answer["shared"]["tokens"]
    assert "the same 3 tokens" in capsys.readouterr().out


def test_first_divergence_counts_from_zero_and_sees_an_early_end() -> None:
    assert first_divergence([1, 2], [1, 2]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2


REFUSALS = {
    ("export", "map=0_1_2"): "map has 3 layers but the model has 6",
    ("export",): "no map given",
    ("export", f"map={MAP}", "export.path=full"): "export.path=full is not empty",
    ("export", f"map={MAP}", "export.path=full", "export.overwrite=true"): "is no export",
    ("export", f"map={MAP}", "export.path=full/file"): "is a file",
    ("generate", f"map={MAP}"): "no prompt given: generate.prompt=",
    ("generate", f"map={MAP}", "generate.prompt="): "generate.prompt is empty",
    ("generate", f"map={MAP}", "generate.file=none.txt"): "generate.file=none.txt cannot be read",
    ("generate", f"map={MAP}", "generate.file=empty.txt"): "is empty: give one prompt a line",
    ("generate", f"map={MAP}", "generate.prompt=a", "generate.file=b"): "exclude each other",
    ("generate", f"map={MAP}", "generate.prompt=a", "generate.chat=true"): "no chat template",
    ("generate", "map=0_1_2", "generate.prompt=a"): "map has 3 layers",
    ("generate", f"map={MAP}", "generate.prompt=a", "generate.max_new_tokens=0"): "at least 1",
    ("generate", f"map={MAP}", "generate.prompt=a", "generate.max_new_tokens=2048"): "2049 tokens",
    ("bench", "map=0_1_2"): "map has 3 layers but the model has 6",
    ("bench", f"map={MAP}", "bench.contexts=[4096]"): "max_position_embeddings=2048",
    ("bench", "bench.contexts=[2049]"): "max_position_embeddings=2048",
    ("bench", "bench.batch_sizes=[0]"): "bench.batch_sizes=0: give at least 1",
    ("bench", "bench.contexts=[]"): "bench.contexts is empty",
    ("bench", "bench.repeats=0"): "bench.repeats=0: give at least 1",
    ("bench", "bench.new_tokens=0"): "bench.new_tokens=0: give at least 1",
    ("bench", "bench.memory_gib=0"): "bench.memory_gib=0",
    ("bench", "compression.ratios=[0.01]"): "asks for 0 of",
}


@pytest.mark.parametrize("arguments", REFUSALS, ids=" ".join)
def test_bad_input_is_one_line(arguments, tmp_path: Path, monkeypatch, capfd, store) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty.txt").touch()
    assert main([*QUICK, *store, f"hydra.run.dir={tmp_path}/run", *arguments]) == 2
    check_refusal(capfd.readouterr().err, REFUSALS[arguments])
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not (tmp_path / "run" / "result.json").exists()

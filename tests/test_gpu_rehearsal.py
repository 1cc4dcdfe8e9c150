"""``make gpu`` rehearsed with tiny shapes on the CPU: nothing is done twice or lost."""

import gc
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu import __main__ as driver
from tests.benchmarks.gpu.__main__ import BAD_INPUT, LEFT, main
from tests.benchmarks.gpu.page import page
from tests.benchmarks.gpu.parts import CELLS, MACHINE, PLANS, ROOT, all_parts
from tests.benchmarks.gpu.worker import work

LONG = ("tests-caches", "tests-contract", "tests-processes", "tests-scoring")
QUICK = [part for part in all_parts(tiny=True) if part.name not in LONG]
HEADER = ("card", "memory_gib", "torch", "cuda", "transformers")
HANG = 300  # seconds; an undisturbed rehearsal of all parts takes a quarter of that


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.json")}


def wait_for_a_part(folder: Path, running: Callable[[], bool]) -> None:
    until = time.monotonic() + HANG
    while not times(folder):
        assert running() and time.monotonic() < until, "no part was done"
        time.sleep(0.005)


def work_in_one_thread(folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    work(folder, QUICK[::-1], "cpu")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a worker was killed after its first part, and another one did the rest."""
    folder = tmp_path_factory.mktemp("gpu")
    gc.collect()
    gc.freeze()  # each measurement collects garbage, and need not walk what other tests left
    request.addfinalizer(gc.unfreeze)
    process = multiprocessing.get_context("fork").Process(target=work_in_one_thread, args=[folder])
    process.start()
    wait_for_a_part(folder, process.is_alive)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    first = times(folder)
    assert 0 < len(first) < len(QUICK)
    work(folder, QUICK, "cpu")
    after = times(folder)
    assert first.items() <= after.items()
    assert after.keys() == {f"{part.name}.json" for part in QUICK}
    return folder


def test_a_sitting_without_minutes_does_nothing_and_says_what_is_left(tmp_path, capsys) -> None:
    assert main(["--tiny", "--minutes", "0", "--out", str(tmp_path / "new")]) == LEFT
    assert not (tmp_path / "new").exists()
    said = capsys.readouterr().out
    assert said.startswith(f"{len(all_parts(True))} of {len(all_parts(True))} parts are left")
    assert "python -m tests.benchmarks.gpu --tiny --minutes 0 --out" in said


def test_names_that_are_no_parts_are_refused(tmp_path, capsys) -> None:
    assert main(["--tiny", "--only", "no-*", "--out", str(tmp_path)]) == BAD_INPUT
    assert capsys.readouterr().out.startswith("gpu: no part is named no-*: give names like tests-")


def test_what_is_done_is_skipped_and_the_page_names_it_all(folder: Path, capsys) -> None:
    before = times(folder)
    names = [part.name for part in QUICK]
    assert main(["--tiny", "--out", str(folder), "--only", *names]) == 0
    assert times(folder) == before
    assert f"all {len(QUICK)} parts are done" in capsys.readouterr().out
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("## On a GPU: the CPU (a rehearsal)\n")
    assert f"torch {torch.__version__}, CUDA" in text
    assert "4 of 8 parts are not there yet" in text
    cells = [part.arguments for part in QUICK if part.kind == "bench"]
    assert len(cells) == len(PLANS)
    for cell in cells:
        where = f"| {cell['batch']} × ({cell['context']} + {cell['new_tokens']}) "
        assert f"{where}| {cell['decoded']} | {cell['plan']} |" in text


def test_the_gpu_tests_ran_and_the_numbers_are_those_predicted(folder: Path) -> None:
    found = {part.name: part.result(folder)["result"] for part in QUICK}
    tests = found["tests-measures"]
    assert tests["failed"] == {}
    assert tests["passed"] >= 4
    assert all("CUDA itself" in why for why in tests["skipped"].values())
    trials = found["evaluator-tiny-float32"]["trials"]
    assert len({row["blocks"] for row in trials}) == 1
    assert all(0 < row["min"] <= row["seconds"] <= row["max"] for row in trials)
    for part in QUICK:
        if part.kind == "bench":
            cell = found[part.name]
            for side in ("full", "shared"):
                assert cell[side]["cache_bytes"] == cell["predicted"]["kv_bytes"][side]
            assert cell["shared"]["cache_bytes"] < cell["full"]["cache_bytes"]


def test_parts_that_ended_twice_or_on_another_card_are_said(folder: Path, tmp_path) -> None:
    parts = [part for part in QUICK if part.kind == "bench"]
    (tmp_path / "parts").mkdir()
    (tmp_path / MACHINE).write_text((folder / MACHINE).read_text())
    lost = {"name": parts[0].name, "without_result": ["killed after 12 s", "killed after 480 s"]}
    parts[0].path(tmp_path).write_text(json.dumps(lost))
    full = parts[1].result(folder)
    full["result"] = {**parts[1].arguments, "out_of_memory": "CUDA out of memory."}
    parts[1].path(tmp_path).write_text(json.dumps(full))
    text = page(tmp_path, parts)
    assert f"- `{parts[0].name}` killed after 12 s; killed after 480 s" in text
    assert "| q4 | out of memory |" in text
    names = [part.name for part in parts]
    assert main(["--tiny", "--out", str(tmp_path), "--only", *names]) == 1
    here = json.loads((tmp_path / MACHINE).read_text())
    (tmp_path / MACHINE).write_text(json.dumps({**here, "card": "another"}))
    with pytest.raises(ValueError, match=r"made with card=another, .*: give another --out"):
        work(tmp_path, parts, "cpu")


def test_the_page_shows_peaks_of_memory_and_tests_that_failed(folder: Path, tmp_path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / MACHINE).write_text(json.dumps(dict.fromkeys(HEADER, "x") | {"memory_gib": 80}))
    tests, cell = QUICK[0], QUICK[-1]
    found = tests.result(folder)
    found["result"]["failed"] = {"test_measures.py::test_fits": "assert 1\n == 2"}
    tests.path(tmp_path).write_text(json.dumps(found))
    found = cell.result(folder)
    for side, mib in (("full", 3), ("shared", 2)):
        found["result"][side]["peak_memory_bytes"] = {"median": mib * 2**20}
    cell.path(tmp_path).write_text(json.dumps(found))
    text = page(tmp_path, QUICK)
    assert "`make gpu` ran on x with 80 GiB: torch x" in text
    assert "| 3.00 → 2.00 |" in text
    assert "- `test_measures.py::test_fits`: assert 1 == 2" in text
    assert main(["--tiny", "--out", str(tmp_path), "--only", tests.name]) == 1


BEGIN = "import sys, time; open(sys.argv[2] + '/under_way', 'w').write(sys.argv[4]); "


@pytest.mark.parametrize(
    ("does", "minutes", "said"),
    [
        ("raise SystemExit('no such kernel')", 1, "ended with exit code 1: no such kernel"),
        ("time.sleep(60)", 0.01, "killed at the end of the sitting"),
        ("import os; os.kill(os.getpid(), 9)", 1, "ended with exit code -9: "),
    ],
)
def test_a_part_that_ends_twice_without_a_result_is_given_up(
    does: str, minutes: float, said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The driver with a worker that begins its first part, and then fails."""
    monkeypatch.setattr(driver, "WORKER", (sys.executable, "-c", BEGIN + does))
    name = next(part.name for part in QUICK if part.kind == "bench")
    (tmp_path / MACHINE).write_text(json.dumps(dict.fromkeys(HEADER, "x")))
    command = ["--tiny", "--minutes", str(minutes), "--out", str(tmp_path), "--only", name]
    codes = [main(command)]
    if codes[0] == LEFT:  # the minutes were over
        codes.append(main(command))
    assert codes[-1] == 1
    lost = json.loads((tmp_path / "parts" / f"{name}.json").read_text())["without_result"]
    assert len(lost) == 2
    assert all(one.startswith(said) for one in lost)
    assert capsys.readouterr().out.count(f"{name}: {said}") == 2
    assert f"- `{name}` {said}" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_worker_whose_driver_is_gone_begins_nothing(tmp_path: Path) -> None:
    work(tmp_path, QUICK, "cpu", driver=0)
    assert times(tmp_path) == {}


def test_a_worker_that_comes_to_no_part_ends_the_sitting(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(driver, "WORKER", (sys.executable, "-c", "import no_such_module"))
    assert main(["--tiny", "--out", str(tmp_path)]) == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'; see" in capsys.readouterr().out


def test_the_cells_are_at_the_lengths_of_the_paper() -> None:
    """Each long answer has a cell that ends where the paper's does, and one at its prompt."""
    for paper in ((512, 32), (256, 2048), (512, 2048), (1024, 4096)):
        mine = [cell for cell in CELLS if cell[2].startswith(f"{paper[0]}+{paper[1]}:")]
        assert paper[0] in {context for context, _, _ in mine}
        assert sum(paper) in {context + new for context, new, _ in mine}
        assert all(new == min(128, paper[1]) for _, new, _ in mine)


@pytest.mark.slow
def test_a_killed_driver_is_continued_to_the_end(tmp_path: Path) -> None:
    """Real processes: all GPU tests, a driver that is killed, and one whose minutes end."""

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--tiny", "--out", str(tmp_path)]
        return subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    first = start()
    wait_for_a_part(tmp_path, lambda: first.poll() is None)
    first.kill()
    first.wait(HANG)
    before = times(tmp_path)
    short = start("--minutes", "0.02")
    assert short.wait(HANG) == LEFT
    assert before.items() <= times(tmp_path).items()
    last = start()
    said = last.communicate(timeout=HANG)[0]
    assert last.returncode == 0, said
    assert before.items() <= times(tmp_path).items()
    parts = all_parts(tiny=True)
    assert times(tmp_path).keys() == {f"{part.name}.json" for part in parts}
    tests = [part.result(tmp_path)["result"] for part in parts if part.kind == "tests"]
    assert [found["failed"] for found in tests] == [{}] * len(tests)
    assert sum(found["passed"] for found in tests) >= 70
    assert "parts are not there yet" not in (tmp_path / "gpu.md").read_text(encoding="utf-8")

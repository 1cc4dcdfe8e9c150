"""An ablation that is killed continues arm by arm, and gives what it would have given."""

import fcntl
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.config.commands import TrackingConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.steps import ablation_outputs, ablation_plans
from kvsharer_exp.cli.steps.ablation_memory import AblationMemory
from kvsharer_exp.cli.steps.ablation_rows import RowScorer
from kvsharer_exp.search.paper.arms import Walker
from kvsharer_exp.values.errors import InputError
from tests.cli.commands.test_ablate_plans import HELD_OUT, QUICK
from tests.refusals import check_refusal

ARMS = "ablate.arms=[dissimilar_tested,random_untested,affine]"
WORDS = ("ablate", *QUICK, *HELD_OUT, ARMS, "ablate.draws=1", "--quiet")


def plain(value: Any) -> Any:
    """``value`` without seconds and ids."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if "seconds" not in k and "run_id" not in k}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is computed; a first letter each."""
    made: list[str] = []
    for owner, method, letter in (
        (RowScorer, "_measure", "m"),
        (Walker, "run", "w"),
        (ablation_plans, "errors_of", "e"),
    ):
        inner = getattr(owner, method)

        def counted(*arguments, inner=inner, letter=letter, **options):
            made.append(letter)
            return inner(*arguments, **options)

        monkeypatch.setattr(owner, method, counted)
    return made


@pytest.mark.slow
def test_it_continues(tmp_path: Path, store, monkeypatch, capsys, calls: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation_outputs, "save_png", lambda figure: b"")  # they take seconds
    store = [store[0], "tracking.folder=mlruns"]
    assert main([*WORDS, *store, "hydra.run.dir=whole"]) == 0
    whole, cost = json.loads(Path("whole/result.json").read_text()), len(calls)
    assert not list(Path("mlruns/ablations").iterdir())
    runs: list[str] = []
    for stop in (2, 4, 100):  # the last one as soon as block errors are kept
        calls.clear()
        inner = AblationMemory._keep

        left = iter(range(stop))

        def stopped(self, key, value, inner=inner, left=left):
            measured = any(known.startswith('["errors"') for known in self._known)
            if next(left, None) is None or measured:
                raise KeyboardInterrupt
            inner(self, key, value)

        with monkeypatch.context() as patch:
            patch.setattr(AblationMemory, "_keep", stopped)
            patch.setattr(RunLog, "__exit__", lambda *_: None)
            assert main([*WORDS, *store, f"hydra.run.dir=stop{stop}"]) == 130
        (file,) = Path("mlruns/ablations").iterdir()
        runs = [json.loads(line)[1] for line in file.read_text().splitlines() if '["run"' in line]
    with file.open("a") as half:
        half.write('["walk", [{"compr')
    calls.clear()
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        capsys.readouterr()
        assert main([*WORDS, *store, "hydra.run.dir=second"]) == 2
        check_refusal(capsys.readouterr().err, "this ablation is being run by another process")
    assert main([*WORDS, *store, "hydra.run.dir=last"]) == 0
    last = json.loads(Path("last/result.json").read_text())
    assert plain(last) == plain(whole)
    assert len(calls) <= cost - 3  # what was kept, but for the full cache
    assert "e" not in calls
    client = MlflowClient(store[0].partition("=")[2])
    runs.append(last["mlflow_run_id"])
    for before, after in itertools.pairwise(runs):
        assert client.get_run(before).info.status == "KILLED"
        assert client.get_run(before).data.tags["continued_by"] == after
        assert client.get_run(after).data.tags["continues"] == before
    assert client.get_run(runs[-1]).info.status == "FINISHED"
    assert not file.exists()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"{}\n", b"[1, 2]\n", b'["a"]\n', b"[[]\n", b"[" * 9000 + b"\n"]
)
def test_a_damaged_file_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    config = Config(tracking=TrackingConfig(folder=str(tmp_path)))
    about = SimpleNamespace(description={}, texts=SimpleNamespace(fingerprints={}))
    memory = AblationMemory(config, about, about)
    with memory:
        assert memory.once(["walk", 1], lambda: 5) == 5
        (file,) = (tmp_path / "ablations").iterdir()
        good = file.read_bytes()
    file.write_bytes(good + content)
    for _ in range(2):  # the lock is let go of
        with pytest.raises(InputError, match=r"jsonl is damaged: remove it"), memory:
            pass
    assert file.read_bytes() == good + content
    file.write_bytes(good + b'["half')
    with memory:
        assert memory.once(["walk", 1], lambda: 6) == 5

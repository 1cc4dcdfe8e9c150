"""One finished run of each command on the tiny model, for what reads runs."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvsharer_exp.cli.main import main

EXPERIMENT = "tests of finished runs"
_GIVEN = "map=0_0_2_3_4_4"
QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("heldout.num_windows=4", "heldout.window_tokens=24", "compression.ratios=[0.34,0.5]"),
    *("scoring.report.tasks=[]", "scoring.search.tasks=[]", "search.threshold=-1", "seed=3"),
)
_COMMANDS = {
    "search": (),
    "evaluate": (_GIVEN,),
    "bench": (_GIVEN, "bench.contexts=[8]", "bench.new_tokens=2", "bench.repeats=1"),
    "ablate": (
        *("ablate.name=paper_random", "ablate.draws=2", "ablate.lengths=[[8,2]]"),
        *("ablate.arms=[dissimilar_tested,random_untested]", "bench.repeats=1"),
    ),
    "sweep": ("study.n_trials=8", "study.name=recorded", "study.margin=9", "study.final_windows=8"),
}


@pytest.fixture(scope="session")
def own(store: list[str]) -> list[str]:
    """The session's store, and an experiment in it that holds `runs`."""
    return [*store, f"tracking.experiment={EXPERIMENT}"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, own: list[str]) -> Mapping[str, Path]:
    """Command → the folder of its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    for name, words in _COMMANDS.items():
        run_dir = f"hydra.run.dir={folder / name}"
        assert main([name, *words, *QUICK, *own, run_dir, "--quiet"]) == 0
    return {name: folder / name for name in _COMMANDS}


def read(folder: Path) -> dict:
    """What a run wrote."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def id_of(folder: Path) -> str:
    """Its MLflow run."""
    return read(folder)["mlflow_run_id"]

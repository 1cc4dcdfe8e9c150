"""A damaged ``result.json``, ``front.json`` or plan is read or refused, and left as it was."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsharer_exp.cli.session.finished_runs import finished_run
from kvsharer_exp.cli.session.result_file import SCHEMA
from kvsharer_exp.reporting.result_readers import READERS, measured
from kvsharer_exp.search.seeds import SeedFile
from kvsharer_exp.tracking.runs import Runs
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry
from tests.fuzz.mutations import damaged_bytes, damaged_file, damaged_json, read_or_refused, sizes


class NoRuns:
    """A store that holds no run, so that the run folder is all there is."""

    def find(self, run_id: str) -> None:
        return None


SCORES = {"kl": 0.5, "kl/report": 0.4, "perplexity/report": 20.5, "lm_eval/fact/acc": 0.5}
PLANS = [KVPlan.parse(text) for text in ("0_1_0_3", "0_1q4g64s4_0_a", "0_1_0k1v_x")]
FRONT = [
    FrontEntry(
        plan.sharing_map and plan.sharing_map.kv_source_layers,
        *(plan.digest, len(plan.targets), 0.75 - 0.25 * place, SCORES),
        intervals={"kl": [0.4, 0.6]},
        plan=str(plan),
    ).to_dict()
    for place, plan in enumerate(PLANS)
]
RESULT = {
    **{"schema": SCHEMA, "command": "sweep", "mlflow_run_id": "a" * 32},
    **{"model": {"id": "tiny", "num_layers": 4}, "directions": {}, "trials": {"complete": 3}},
    **{"full": {"scores": SCORES}, "front": FRONT, "paper_greedy": FRONT[:1]},
}
HOLDERS: dict[str, Any] = {
    "result.json": RESULT,
    "front.json": FRONT,
    "plan.json": json.loads(PLANS[1].to_json()),
    "map.json": json.loads(PLANS[0].to_json()),
}


def read_plans(path: Path) -> None:
    """Read ``path`` in every way that a user may name it."""
    for choice in ("", ":1", ":0.5", ":.", ":٣", ":9"):
        with read_or_refused(path.parent):
            assert KVPlan.parse(f"{path}{choice}").num_layers > 0
    with read_or_refused(path.parent):
        assert SharingMap.parse(path).num_layers > 0
    with read_or_refused(path.parent):
        assert SeedFile.read(path).maps


@pytest.mark.parametrize("name", HOLDERS)
@sizes(60)
def test_files_of_plans(size: settings, name: str, tmp_path: Path) -> None:
    @size
    @given(damaged_file(HOLDERS[name]))
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        read_plans(tmp_path / name)

    check()


@sizes(150)
def test_runs(size: settings, tmp_path: Path) -> None:
    folder = tmp_path / ".hydra"
    folder.mkdir()
    config = b"model:\n  name: tiny\nheldout:\n  num_windows: 2\nsearch: {acceptance: true}\n"

    @size
    @given(damaged_file(RESULT), damaged_bytes(config) | st.just(config))
    def check(content: bytes, settled: bytes) -> None:
        (tmp_path / "result.json").write_bytes(content)
        (folder / "config.yaml").write_bytes(settled)
        with read_or_refused(tmp_path):
            run = finished_run(cast(Runs, NoRuns()), str(tmp_path), READERS)
            assert all(isinstance(value.model_id, str) for value in measured(run))

    check()


TEXTS = st.one_of(
    *[
        damaged_bytes(str(plan).encode()).map(lambda b: b.decode(errors="replace"))
        for plan in PLANS
    ],
    *[damaged_json(json.loads(plan.to_json())) for plan in PLANS],
    damaged_json(list(range(4))),
    st.text('0123qgskvxca_.:٣५-+ \0\ud800/[]{}"', max_size=30),
    st.sampled_from(
        ["9" * 5000, "0_" + "9" * 5000 + "q4", "0_1q" + "9" * 5000, "x" * 500 + ".json"]
    ),
    st.sampled_from(["\0.json", "\ud800.json", "/.json", "0_1q4g" + "8" * 4000]),
)


@sizes(400)
def test_texts_of_plans(size: settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @size
    @given(TEXTS)
    def check(text: str) -> None:
        with read_or_refused(tmp_path):
            plan = KVPlan.parse(text)
            assert KVPlan.parse(str(plan)) == plan
        with read_or_refused(tmp_path):
            assert SharingMap.parse(text).owners

    check()

"""What waits for a server is on the disk whole, in order, and for one study only."""

from pathlib import Path

import optuna
import pytest

from kvsharer_exp.search.spool import Spool, trial_from_json, trial_to_json
from kvsharer_exp.values.errors import InputError


def test_writes_are_read_back_in_order_by_the_next_process(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.spool", "here 1")
    assert not spool
    for number in range(3):
        spool.append({"attribute": "é", "value": number})
    again = Spool(tmp_path / "s.spool", "here 1")
    assert len(again) == 3
    assert [write["value"] for write in again.writes()] == [0, 1, 2]
    again.append({"attribute": "a", "value": 3})
    assert [write["value"] for write in again.writes()] == [0, 1, 2, 3]
    again.clear()
    assert not list(tmp_path.iterdir())
    assert again.writes() == []


@pytest.mark.parametrize("left", [1, 20, -1, -5])
def test_a_last_line_that_is_half_written_is_cut_off(tmp_path: Path, left: int) -> None:
    path = tmp_path / "s.spool"
    spool = Spool(path, "here 1")
    spool.append({"attribute": "a", "value": 0})
    whole = path.read_bytes()
    spool.append({"attribute": "b", "value": 1})
    both = path.read_bytes()
    path.write_bytes(both[: len(whole) + left] if left > 0 else both[:left])
    again = Spool(path, "here 1")
    again.append({"attribute": "c", "value": 2})
    assert [write["attribute"] for write in again.writes()] == ["a", "c"]


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_without_a_whole_line_is_none(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s.spool"
    path.write_bytes(b'{"study": "here 1"}'[:size])
    spool = Spool(path, "here 1")
    spool.append({"attribute": "a", "value": 0})
    assert len(Spool(path, "here 1").writes()) == 1


def test_that_of_another_study_and_another_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.spool"
    Spool(path, "there 1").append({"attribute": "a", "value": 0})
    with pytest.raises(InputError, match="keeps trials for the study there 1: give"):
        Spool(path, "here 1")
    path.write_text("notes of mine\n")
    with pytest.raises(InputError, match="move it away"):
        Spool(path, "here 1")
    assert path.read_text() == "notes of mine\n"


def test_a_trial_comes_back_as_it_was() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    distributions = {
        "float": optuna.distributions.FloatDistribution(0.0, 1.0),
        "int": optuna.distributions.IntDistribution(1, 9),
        "choice": optuna.distributions.CategoricalDistribution([None, "a", 2, 0.5, True]),
    }
    for state in ("complete", "pruned"):
        trial = study.ask(distributions)
        trial.set_user_attr("result", "{}")
        if state == "complete":
            study.tell(trial, (0.1, -0.3))
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    for trial in study.get_trials():
        kept = trial_from_json(trial_to_json(trial))
        kept.number = trial.number
        kept._trial_id = trial._trial_id
        assert kept == trial


@pytest.mark.parametrize(
    "text",
    [
        "notes of mine",
        "notes of mine\nand more",
        '{"study": "here 1"}\n{"attribute": 1, "value": 2}\n',
        '{"study": "here 1"}\n{"trial": {"state": "COMPLETE"}}\n{"trial"',
        '{"study": 1}\n',
        '{"study": "here 1"}\n' + "[" * 5000 + "\n",
    ],
)
def test_a_file_that_is_refused_keeps_every_byte(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.spool"
    path.write_text(text)
    with pytest.raises(InputError, match="keeps no trials that wait for a server: move it away"):
        Spool(path, "here 1")
    assert path.read_text() == text

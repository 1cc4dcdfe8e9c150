"""The copy of a study in memory that the sampler works on."""

from __future__ import annotations

from collections.abc import Container, Sequence

import optuna
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from kvsharer_exp.values.trial import TrialResult


def working_study(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> optuna.Study:
    """A study in memory with these trials."""
    study = optuna.create_study(storage=_WorkingStorage(), directions=directions)
    study.add_trials(trials)
    return study


def tell(study: optuna.Study, number: int, result: TrialResult) -> FrozenTrial:
    """Tell the study what came of its trial ``number``; returns the trial."""
    if result.score is not None:
        return study.tell(number, (result.footprint.kv_fraction, result.score))
    pruned = result.status == "screened_out"
    return study.tell(number, state=TrialState.PRUNED if pruned else TrialState.FAIL)


class _WorkingStorage(InMemoryStorage):
    """Optuna's storage in memory, which finds waiting trials without looking at all trials.

    Optuna asks for them before every draw. With 100,000 trials that would be most of a draw's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting = True

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if template_trial is not None and template_trial.state == TrialState.WAITING:
            self._waiting = True
        return int(super().create_new_trial(study_id, template_trial))

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,) and not self._waiting:
            return []
        found: list[FrozenTrial] = super().get_all_trials(study_id, deepcopy, states)
        if states == (TrialState.WAITING,):
            self._waiting = bool(found)
        return found

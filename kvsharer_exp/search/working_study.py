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
    """Optuna's storage in memory, which gives its list of all trials without copying it.

    Our samplers ask for it before every draw, and 100,000 trials take milliseconds to copy.
    """

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        if states is None and not deepcopy:
            return self._studies[study_id].trials
        return list(super().get_all_trials(study_id, deepcopy, states))

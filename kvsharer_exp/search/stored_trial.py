"""What a trial of a study remembers beside its parameters: result, origin, and if it was known.

Optuna keeps them as user attributes, in JSON. Their names are known here only.
"""

from __future__ import annotations

from optuna.trial import FrozenTrial, Trial

from kvsharer_exp.values.trial import SAMPLED, TrialResult

_RESULT, _CACHED, _ORIGIN = "result", "cached_from", "origin"


def result_of(trial: FrozenTrial) -> TrialResult | None:
    """The result of a stored trial; None if it is under way, or if it met a known map."""
    text = trial.user_attrs.get(_RESULT)
    return None if text is None else TrialResult.from_json(text)


def keep_result(trial: Trial, result: TrialResult) -> None:
    """Store ``result`` with its trial."""
    trial.set_user_attr(_RESULT, result.to_json())


def set_result(trial: FrozenTrial, result: TrialResult) -> None:
    """Replace the result of a trial that is not stored yet."""
    trial.user_attrs = {**trial.user_attrs, _RESULT: result.to_json()}


def keep_cached(trial: Trial, known: TrialResult) -> None:
    """Store that the trial met a map that ``known`` has scored."""
    trial.set_user_attr(_CACHED, known.number)


def is_cached(trial: FrozenTrial) -> bool:
    """Whether the trial met a map that was known."""
    return _CACHED in trial.user_attrs


def origin_of(trial: Trial) -> str:
    """Where the map of a trial comes from: the origin of a seed, or the sampler."""
    return str(trial.user_attrs.get(_ORIGIN, SAMPLED))


def origin_attributes(origin: str) -> dict[str, str]:
    """The attributes to give Optuna's ``enqueue_trial``, so that `origin_of` finds ``origin``."""
    return {_ORIGIN: origin}

"""The end of a sweep's search: who is best of each size, decided on more text than the search had.

A search goes by the KL on a few windows, which differs less from window to window than the loss on
the text does (of two good maps of SmolLM2 the standard deviation is 0.016 against 0.03 nats, 256
tokens a window). But the map of least KL is not the one of least perplexity, which is what counts
in the end and takes a hundred windows to see.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import optuna

from kvsharer_exp.cli.commands.session import Session
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.search.finals import Batch, Losses, finalists, race, winners
from kvsharer_exp.values.trial import TrialResult

_SHARE = 0.4  # of study.minutes
_DECIDED = {"kl", "perplexity"}  # what is searched for when more text may decide
_KEPT = "finals"


def search_minutes(config: Config) -> float | None:
    """What ``study.minutes`` leaves for the search."""
    minutes = config.study.minutes
    return minutes if minutes is None or not _are_held(config) else (1 - _SHARE) * minutes


def _are_held(config: Config) -> bool:
    wanted = config.study.final_windows
    some = config.study.minutes is not None if wanted is None else wanted > 0
    return some and config.scoring.weights.keys() <= _DECIDED


def hold_finals(
    session: Session,
    study: optuna.Study,
    found: Sequence[TrialResult],
    front: list[TrialResult],
    *,
    minutes: float | None,
) -> tuple[list[TrialResult], dict[str, Any]]:
    """The front that more text decides on, and what ``result.json`` says of how.

    ``minutes`` end them; None: the windows do. A loss is the increase of the loss on the text over
    the full cache's, in nats. Kept in the study, so that a killed run goes on where it was.
    """
    maps = finalists(found, front)
    if not _are_held(session.config) or len(maps) == len(front):
        return front, {"windows": 0}
    windows = session.final_windows
    if not len(windows):
        session.say("no finals: the calibration text has no windows but those of the search")
        return front, {"windows": 0}
    session.say(f"finals: {len(maps)} maps for {len(front)} places on up to {len(windows)} windows")
    size = session.config.scoring.batch_size
    session.scoring_evaluator.reset()
    budget = max(0, session.memory_budget - session.scoring_evaluator.kept_bytes)
    kept: dict[str, list[float]] = dict(study.user_attrs.get(_KEPT, {}))

    def batches() -> Iterator[Batch]:
        for begin in range(0, len(windows), size):
            part = slice(begin, begin + size)
            evaluator = Evaluator(
                session.model, windows[part], batch_size=size, memory_budget=budget
            )
            yield partial(_losses, evaluator, part, kept)
            study.set_user_attr(_KEPT, kept)

    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    left = race(maps, batches(), lambda: deadline is not None and time.monotonic() >= deadline)
    best = winners(maps, left)
    seen = max(map(len, left.values()))
    session.say(f"finals: {len(left)} maps are left after {seen} windows")
    return best or front, {"windows": seen, "maps": _standing(maps, left, best)}


def _losses(
    evaluator: Evaluator, part: slice, kept: dict[str, list[float]], result: TrialResult
) -> list[float]:
    """Of the map on the windows of ``part``, which ``evaluator`` has; ``kept`` from then on."""
    known = kept.setdefault(result.sharing_map.digest, [])
    if len(known) <= part.start:
        shared, full = evaluator.score(result.sharing_map), evaluator.full_scores
        known += [a - b for a, b in zip(shared.nlls, full.nlls, strict=True)]
    return known[part]


def _standing(
    maps: Sequence[TrialResult], left: Losses, best: Sequence[TrialResult]
) -> list[dict[str, Any]]:
    return [
        {
            "kv_source_layers": list(result.sharing_map.kv_source_layers),
            "digest": result.sharing_map.digest,
            "num_shared": len(result.sharing_map.targets),
            "loss": fmean(left[result.number]) if left.get(result.number) else None,
            "on_front": result in best,
        }
        for result in maps
    ]

"""The groups ``calibration`` and ``heldout``: the texts a command calibrates on and reports on.

`Config` holds both groups, and `Windows` cuts the token windows that they ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvsharer_exp.cli.config.text_keys import PATH
from kvsharer_exp.values.errors import InputError, at_least, did_you_mean


@dataclass
class CalibrationConfig:
    """The calibration windows, which give the layer means and the acceptance test of the paper.

    The windows of the fitness are cut from the same text; `ScoringConfig` says how many.

    Args:
        path: ``wikipedia`` (the default), ``news``, a ``.txt`` with one passage a line or with
            wrapped paragraphs, a ``.jsonl`` with "text", or
            ``hub:<dataset>[/<config>][:<split>]``.
        num_windows: the number of windows, at least 1. Default: 30.
        window_tokens: the tokens of each window, at least 2. Default: 64.
        distance: what ranks the pairs of layers: a distance of their mean KV, ``euclidean_flat``
            (the default), ``euclidean_token``, ``cosine`` or ``cka``; or ``block_output``, the
            block error of the pair.
        states: what such a distance compares: keys and values ``kv`` (the default), keys ``k`` or
            values ``v``. It has no effect on ``block_output``.
    """

    path: str = field(default="wikipedia", metadata=PATH)
    num_windows: int = 30
    window_tokens: int = 64
    distance: str = "euclidean_flat"
    states: str = "kv"

    def __post_init__(self) -> None:
        at_least("calibration.num_windows", self.num_windows, 1)
        at_least("calibration.window_tokens", self.window_tokens, 2)
        distances = ("euclidean_flat", "euclidean_token", "cosine", "cka", "block_output")
        one_of("calibration.distance", self.distance, distances)
        one_of("calibration.states", self.states, ("kv", "k", "v"))


@dataclass
class HeldoutConfig:
    """The held-out windows, which are cut from the report part: the search never sees that part.

    Our own tasks are made from the same text: those of the report from the report part, and those
    whose name ends in ``_search`` from the search part.

    Args:
        path: the text, as for `CalibrationConfig`. Default: ``wikipedia``. It may be the
            calibration text, for no two parts share a sentence.
        num_windows: the number of windows, at least 1. Default: 8.
        window_tokens: the tokens of each window, at least 2. Default: 256.
    """

    path: str = field(default="wikipedia", metadata=PATH)
    num_windows: int = 8
    window_tokens: int = 256

    def __post_init__(self) -> None:
        at_least("heldout.num_windows", self.num_windows, 1)
        at_least("heldout.window_tokens", self.window_tokens, 2)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a ``value`` that is none of ``choices``.

    Raises:
        InputError: the value is refused; the message names ``key`` and ``value``.
    """
    if value not in choices:
        raise InputError(f"{key}={value} is unknown: {did_you_mean(value, choices)}")

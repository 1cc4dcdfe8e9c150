"""Which texts a command calibrates on and reports on."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.errors import InputError, at_least, did_you_mean


@dataclass
class CalibrationConfig:
    """Windows for layer means and the acceptance test, as in the paper; ``scoring`` has those of
    the fitness, cut from the same text. ``path``: wikipedia, news,
    a .txt (one passage a line), a .jsonl with "text", or hub:<dataset>[/<config>][:<split>]."""

    path: str = "wikipedia"
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
    """Text the search never sees (its report part) or sees only through search tasks."""

    path: str = "wikipedia"
    num_windows: int = 8
    window_tokens: int = 256

    def __post_init__(self) -> None:
        at_least("heldout.num_windows", self.num_windows, 1)
        at_least("heldout.window_tokens", self.window_tokens, 2)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{key}={value} is unknown: {did_you_mean(value, choices)}")

"""What ``doctor`` says of the serving engine, and the form of everything that it says."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.shipping.vllm.environment import find_engine
from kvsharer_exp.values.errors import InputError


@dataclass(frozen=True, slots=True)
class Check:
    """One line of what ``doctor`` prints; if ``works`` is false, ``note`` names the way out."""

    what: str
    works: bool
    note: str


def engine_check(python: str | None) -> Check:
    """Check whether ``kvsharer serve`` has an engine; ``python``: that of ``engine.python``."""
    try:
        engine = find_engine(python)
        engine.check()
    except InputError as error:
        return Check("vLLM", False, str(error))
    return Check("vLLM", True, str(engine).removeprefix("vLLM "))

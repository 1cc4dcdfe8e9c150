"""Say in a line why tasks cannot be loaded, and what to do about it.

`load_tasks` collects what lm-eval, data sets, the hub's clients, YAML and Jinja raise.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip


def not_loaded(failed: Mapping[str, Exception], way: str) -> InputError:
    """Make an error of at most 190 characters on one line.

    It names the tasks, as many as there is room for, and the reason why the first ``failed``. The
    ``way`` out is for data that cannot be fetched.
    """
    error = next(iter(failed.values()))
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, InputError):
        reason, way = str(error), "mend that line, or leave the task out"
    elif (package := _missing_package(error)) is not None:
        reason, way = f"it needs {package}", f"pip install {package}, or use wiki_cloze"
    elif isinstance(error, AssertionError) and "tokenizer" in reason:
        way = "use a model of the hub or a folder, or wiki_cloze"
    names = textwrap.shorten(
        ", ".join(name[-60:] for name in failed), min(110, 150 - len(way)), placeholder=" …"
    )
    what = f"task{'s' if len(failed) > 1 else ''} {names} cannot be loaded"
    room = 185 - len(what) - len(way)
    return InputError(f"{what} ({textwrap.shorten(reason, room, placeholder=' …')}): {way}")


def _missing_package(error: BaseException | None) -> str | None:
    """The package whose absence ``error`` tells of, or what led to it; None if it is no import."""
    while isinstance(error, ImportError):
        if isinstance(error, ModuleNotFoundError) and error.name:
            return clip(error.name.partition(".")[0], 20)
        error = error.__cause__ or error.__context__
    return None

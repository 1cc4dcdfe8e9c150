"""Keep on disk what a study's server could not take, until it can.

`served_study` appends to the spool and empties it. The file has one JSON object a line: in front
what the writes are for, then the writes, the oldest first. Each is on the disk when `append`
returns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.record import typed
from kvsharer_exp.values.text import shorten
from kvsharer_exp.values.text_files import append_whole, read_json, whole_lines

_HEAD = '{"study": '  # every spool begins so
_TIMES = ("datetime_start", "datetime_complete")


class Spool:
    """The writes that wait for one study, in a file that is there only while there are some.

    Args:
        study: what tells the study from every other one, also from one of the same name.
    """

    def __init__(self, path: Path, study: str) -> None:
        """Read what an earlier process left.

        A last line that is half written is cut off: its writer was killed before anybody relied on
        it.

        Raises:
            InputError: the writes are for another study, or the file is no spool. It keeps every
                byte then.
        """
        self.path, self._study = path, study
        self._count = 0
        if not path.exists():
            return
        whole, half = whole_lines(path.read_bytes())
        try:
            head, *writes = map(read_json, whole.decode().splitlines() or [_HEAD + '""}'])
            held = typed(str, head["study"], "study")
            _check(writes)
            assert whole or half.startswith(_HEAD.encode()) or _HEAD.encode().startswith(half)
        except MALFORMED as error:
            raise InputError(
                f"{shorten(path)} keeps no trials that wait for a server: move it away"
            ) from error
        if not whole:
            path.unlink()
            return
        if held != study:
            raise InputError(
                f"{shorten(path, 50)} keeps trials for the study {shorten(held, 50)}: give the "
                "study.storage of that one, or move the file away"
            )
        os.truncate(path, len(whole))
        self._count = len(writes)

    def __len__(self) -> int:
        """The number of writes that wait."""
        return self._count

    def append(self, write: dict[str, Any]) -> None:
        """Put a write on the disk, behind the others.

        Raises:
            OSError: the disk is full, or fails; the others are there as before.
        """
        lines = [write] if self._count else [{"study": self._study}, write]
        with self.path.open("ab") as file:
            append_whole(file.fileno(), "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        self._count += 1

    def writes(self) -> list[dict[str, Any]]:
        """The writes that wait, the oldest first."""
        if not self._count:
            return []
        return [json.loads(line) for line in self.path.read_bytes().splitlines()[1:]]

    def clear(self) -> None:
        """Forget all writes, which the server has now."""
        self.path.unlink(missing_ok=True)
        self._count = 0


def _check(writes: Sequence[Any]) -> None:
    """Refuse what is no write; which error is raised is a matter of what it is."""
    for write in writes:
        if "trial" in typed(dict[str, Any], write, "a write"):
            trial_from_json(write["trial"])
        else:
            typed(str, write["attribute"], "attribute")
            assert "value" in write


def trial_to_json(trial: FrozenTrial) -> dict[str, Any]:
    """A finished trial as JSON values, for `trial_from_json`."""
    times = {name: getattr(trial, name) for name in _TIMES}
    return {
        "state": trial.state.name,
        "values": trial.values,
        **{name: at and at.isoformat() for name, at in times.items()},
        "params": trial.params,
        "distributions": {k: distribution_to_json(d) for k, d in trial.distributions.items()},
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,
    }


def trial_from_json(kept: dict[str, Any]) -> FrozenTrial:
    """The trial that `trial_to_json` has written."""
    values: Sequence[float] | None = kept["values"]
    trial = create_trial(
        state=TrialState[kept["state"]],
        values=values,
        params=kept["params"],
        distributions={k: json_to_distribution(d) for k, d in kept["distributions"].items()},
        user_attrs=kept["user_attrs"],
        system_attrs=kept["system_attrs"],
    )
    for name in _TIMES:
        at = kept[name]
        setattr(trial, name, at and datetime.fromisoformat(at))
    return trial

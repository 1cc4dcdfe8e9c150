"""Keep passwords out of the configuration, which is kept in run folders, in MLflow and in results.

`argv.translate` refuses one on the command line, before Hydra writes what it was given. The
configuration refuses one that comes from a file (`StudyConfig`, `TrackingConfig`). `main` takes it
out of the copies that Hydra has made by then.
"""

from __future__ import annotations

import re
from pathlib import Path

from kvsharer_exp.values.addresses import has_password, without_password
from kvsharer_exp.values.errors import InputError

_FREE = "generate."  # the keys of this group take any text


def refuse_password(key: str, address: str) -> None:
    """Refuse an address with a password inside; the message does not repeat it.

    Raises:
        InputError: there is one.
    """
    if not has_password(address):
        return
    way = "leave it out, and set PGPASSWORD or put it into ~/.pgpass"
    if re.search(r"https?://", address):
        way = "leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    raise InputError(f"{key} holds a password, which would be kept in the run folder: {way}")


def refuse_typed_password(argument: str) -> None:
    """Refuse a password in a word of the command line.

    A key that is spelled wrong would be shown with its value, so every word is looked at.

    Raises:
        InputError: there is one.
    """
    key, equals, _ = argument.partition("=")
    named = re.match(r"[\w.]{1,40}", key.lstrip("+~")) if equals and "://" not in key else None
    if not argument.startswith(_FREE):
        refuse_password(named[0] if named else "an address", argument)


def mask_passwords(folder: Path, below: str | None = "") -> None:
    """Take the passwords out of the YAML files that Hydra has written to ``folder``.

    ``below``: the folder in it that has them; None if Hydra writes none.
    """
    if below is None:
        return
    for path in (folder / below).glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        lines = [
            without_password(line) if re.match(r"[\s-]*[\w.+]*(storage|uri)\b", line) else line
            for line in text.splitlines(keepends=True)
        ]
        if "".join(lines) != text:
            path.write_text("".join(lines), encoding="utf-8")

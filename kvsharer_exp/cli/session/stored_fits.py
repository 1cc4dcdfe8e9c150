"""The fits in the cache folder: one file for each layer and action, for each origin a folder.

`Plans` opens a `StoredFits` before it fits anything. While it is open no other process has it open,
so of two commands that start together one fits, and the other reads what the first has kept. A file
that is damaged is as good as none. Where the folder cannot be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from kvsharer_exp.measure.fits import Fits
from kvsharer_exp.model.files import locked
from kvsharer_exp.model.fit_files import (
    FitFileError,
    fit_path,
    load_fit,
    load_fits,
    save_fit,
    save_fits,
)
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.plan import KVPlan

_log = logging.getLogger(__name__)


class StoredFits:
    """The fits of one ``origin`` below ``folder``, as a context manager that holds their lock."""

    def __init__(self, folder: Path, origin: Mapping[str, str], num_layers: int) -> None:
        name = hashlib.sha256(json.dumps(dict(origin), sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self._origin = folder / name, origin
        self._num_layers = num_layers
        self._held = ExitStack()

    def __enter__(self) -> StoredFits:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(self.folder.with_suffix(".lock")))
        except OSError as error:
            _log.warning("fits are not kept in %s (%s)", self.folder.parent, error.strerror)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def fits(self, wanted: Mapping[int, Sequence[Action]]) -> Fits:
        """Those of the ``wanted`` stand-ins, by layer, that are here."""
        found: Fits = {}
        for layer, actions in wanted.items():
            for action in actions:
                if fit_path(self.folder, layer, action).is_file():
                    with _made_again():
                        one = load_fit(self.folder, layer, action, self._num_layers, self._origin)
                        found[layer, action] = one.fits[layer]
        return found

    def keep(self, fits: Fits) -> None:
        """Write ``fits``, each to its file."""
        with self._writing():
            for (layer, action), fit in fits.items():
                save_fit(self.folder, layer, action, fit, self._num_layers, self._origin)

    def plan(self, plan: KVPlan) -> FittedPlan | None:
        """The fits of a whole plan, which depend on each other; None if they are not here."""
        path = self._plan_path(plan)
        if path.is_file():
            with _made_again():
                return load_fits(path, plan, origin=self._origin)
        return None

    def keep_plan(self, fitted: FittedPlan) -> None:
        """Write the fits of a whole plan."""
        with self._writing():
            save_fits(self._plan_path(fitted.plan), replace(fitted, origin=self._origin))

    def _plan_path(self, plan: KVPlan) -> Path:
        return self.folder / f"plan_{plan.digest}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("fits are not kept in %s (%s)", self.folder, error.strerror)


@contextmanager
def _made_again() -> Iterator[None]:
    """Inside, fits are read that are as good as none if they are damaged."""
    try:
        yield
    except FitFileError as error:
        _log.warning("%s: they are made again", error)

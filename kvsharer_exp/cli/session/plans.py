"""The plan of a command: what ``plan=`` or ``map=`` names, with the fits of its stand-ins.

The commands that run one plan ask for `Plans`. Fits are made once for a model, a text and the
settings of ``fit.…``: `StoredFits` keeps them in the cache folder for the commands that follow.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.models_of_plans import check_model
from kvsharer_exp.cli.session.named_maps import read_map
from kvsharer_exp.cli.session.plan_words import kind_of
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.stored_fits import StoredFits
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.measure.fits import Fits, fit_actions, fit_plan
from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.devices import device_of
from kvsharer_exp.model.fit_files import check_origin, save_plan
from kvsharer_exp.model.fitted_plan import Fit, FittedPlan
from kvsharer_exp.model.folders import cache_dir
from kvsharer_exp.model.given_plan import folder_of, read_plan
from kvsharer_exp.tracking.run_plans import plan_of_run, run_and_choice
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import FITS, PLAN, file_and_choice

_VERSION = "1"  # of the way that fits are made: another one makes those of the cache folder anew


class Plans:
    """Reads the plan that the configuration names, and fits the stand-ins of plans."""

    def __init__(self, config: Config, log: RunLog, loaded: LoadedModel, windows: Windows) -> None:
        self._config, self._log, self._loaded, self._windows = config, log, loaded, windows

    @property
    def plan(self) -> KVPlan:
        """The plan that ``plan=`` or ``map=`` names; nothing is fitted for it yet.

        Raises:
            InputError: none or both are given, or what is given is no plan.
        """
        return _bare(self._given)

    @cached_property
    def _given(self) -> KVPlan | FittedPlan:
        """`plan`, with the fits that lie where ``plan=`` points.

        Raises:
            InputError: none or both are given, what is given is no plan, or it is the plan of
                another model, and no model is given.
        """
        config = self._config
        if config.plan is not None and config.map is not None:
            raise InputError("plan= and map= are both given: give one, a plan may be a map")
        if config.plan is None and config.map is None:
            raise InputError(
                "no map given: give map=0_1_0_3, plan=0_1q4_0_a or a .json file with one"
            )
        if config.plan is None:
            return KVPlan.of(read_map(config, self._log.tracker))
        return self._read("plan", config.plan)

    @property
    def other(self) -> KVPlan | None:
        """The plan that ``compare=`` names; None if it is not given.

        Raises:
            InputError: what is given is no plan.
        """
        return None if self._other is None else _bare(self._other)

    @cached_property
    def _other(self) -> KVPlan | FittedPlan | None:
        compare = self._config.compare
        return None if compare is None else self._read("compare", compare)

    def check(self) -> None:
        """Refuse plans that do not fit the model.

        Raises:
            SharingError: the numbers of layers differ, or a layer cannot do its action.
            InputError: the fits that lie beside a plan are of another model or text.
        """
        for given in (self._given, self._other):
            if given is not None:
                self._loaded.check(_bare(given))
            if isinstance(given, FittedPlan):
                self._check_fits(given)

    @cached_property
    def fitted(self) -> FittedPlan:
        """`plan` with its fits: those that lie beside it, or else made on calibration text.

        Raises:
            InputError: the fits that lie there are of another model or text.
        """
        return self._with_fits(self._config.plan, self._given)

    @cached_property
    def other_fitted(self) -> FittedPlan | None:
        """`other` with its fits, as `fitted`.

        Raises:
            InputError: see `fitted`.
        """
        other = self._other
        return None if other is None else self._with_fits(self._config.compare, other)

    def fit(self, plan: KVPlan) -> FittedPlan:
        """``plan`` with fits on the fit windows; those in the cache folder are not made again.

        Raises:
            InputError: the calibration text is too short.
        """
        wanted = {i: [action] for i, action in enumerate(plan.actions) if action.fitted}
        if not wanted:
            return FittedPlan(plan)
        if not self._config.fit.sequential:
            found = self.fits(wanted)
            return FittedPlan(plan, {layer: fit for (layer, _), fit in found.items()}, self.origin)
        with self._stored as stored:
            fitted = stored.plan(plan)
            if fitted is None:
                self._tell(len(wanted))
                fitted = fit_plan(
                    self._loaded.model, plan, self._text, sequential=True, **self._options
                )
                stored.keep_plan(fitted)
        return self._at_home(replace(fitted, origin=self.origin))

    def fits(self, wanted: Mapping[int, Sequence[Action]]) -> Fits:
        """A fit for each of the stand-ins ``wanted``, by layer, each alone in the full model.

        Raises:
            InputError: the calibration text is too short.
        """
        with self._stored as stored:
            known = stored.fits(wanted)
            missing = {
                layer: [action for action in actions if (layer, action) not in known]
                for layer, actions in wanted.items()
            }
            missing = {layer: actions for layer, actions in missing.items() if actions}
            if missing:
                self._tell(sum(map(len, missing.values())))
                made = fit_actions(self._loaded.model, self._text, missing, **self._options)
                stored.keep(made)
                known |= made
        return {key: self._moved(key[0], fit) for key, fit in known.items()}

    @cached_property
    def origin(self) -> dict[str, str]:
        """What fits depend on: model, text, dtype and settings, as files of fits hold it."""
        about, wanted = self._loaded.description, self._config.fit
        digest = hashlib.sha256(json.dumps(self._text.tolist()).encode()).hexdigest()
        return {
            **self._place,
            "model_id": str(about["id"]),
            "dtype": str(about["dtype"]),
            "windows": f"{len(self._text)} of {wanted.window_tokens} tokens, {digest[:12]}",
            "sequential": str(wanted.sequential).lower(),
            "version": _VERSION,
        }

    def keep(self, fitted: FittedPlan) -> None:
        """Write a plan that has fits to the run folder, with them, and the plan to MLflow too."""
        if not fitted.fits:
            return
        save_plan(self._log.folder, fitted)
        tracker, run_id = self._log.tracker, self._log.run_id
        tracker.log_text(run_id, fitted.plan.to_json() + "\n", PLAN)
        tracker.log_bytes(run_id, (self._log.folder / FITS).read_bytes(), FITS)

    @property
    def word(self) -> str:
        """What gives `plan` to another command, with the fits that `keep` has kept of it."""
        if self.fitted.fits:
            return f"plan={shlex.quote(str(self._log.folder))}"
        return f"{kind_of(self.plan)}={self.plan}"

    @property
    def _place(self) -> dict[str, str]:
        """The part of the origin that fits which lie beside a plan have to share."""
        text = self._windows.texts.fingerprints["calibration"]
        return {"model": str(self._loaded.description["fingerprint"]), "text": text}

    @property
    def _stored(self) -> StoredFits:
        return StoredFits(cache_dir() / "fits", self.origin, self._loaded.num_layers)

    @property
    def _options(self) -> dict[str, Any]:
        wanted = self._config.fit
        return {"batch_size": self._config.scoring.batch_size, "memory_bytes": wanted.memory_bytes}

    @cached_property
    def _text(self) -> torch.Tensor:
        wanted, windows = self._config.fit, self._windows.fit
        if len(windows) < 2:
            raise InputError(
                f"calibration.path leaves {len(windows)} windows of fit.window_tokens="
                f"{wanted.window_tokens} beside the scoring windows: give more text, or lower "
                "scoring.num_windows"
            )
        if len(windows) < wanted.num_windows:
            self._log.say(
                f"the calibration text has {len(windows)} windows of {wanted.window_tokens} tokens "
                f"for fits, fit.num_windows={wanted.num_windows} are asked"
            )
        return windows

    def _tell(self, count: int) -> None:
        many = "stand-in" if count == 1 else "stand-ins"
        self._log.say(
            f"fitting {count} {many} on {len(self._text)} windows of "
            f"{self._text.shape[1]} tokens of the calibration text"
        )

    def _at_home(self, fitted: FittedPlan) -> FittedPlan:
        """``fitted`` with its numbers on the devices of their layers: no forward moves them."""
        return replace(fitted, fits={i: self._moved(i, fit) for i, fit in fitted.fits.items()})

    def _moved(self, layer: int, fit: Fit) -> Fit:
        device = device_of(self._loaded.layers[layer].attention)
        return replace(fit, tensors={name: t.to(device) for name, t in fit.tensors.items()})

    def _with_fits(self, value: Any, given: KVPlan | FittedPlan) -> FittedPlan:
        if isinstance(given, FittedPlan):
            self._check_fits(given)
            return self._at_home(given)
        if _is_place(value) and any(action.fitted for action in given.actions):
            self._log.say(
                "the plan has no fits with it: its stand-ins are those of this calibration text"
            )
        return self.fit(given)

    def _check_fits(self, given: FittedPlan) -> None:
        asked = {"sequential": "true"} if self._config.fit.sequential else {}
        check_origin(given.origin, {**self._place, **asked}, "beside the plan")
        check_plan(given, self._loaded.layers)

    def _read(self, key: str, value: Any) -> KVPlan | FittedPlan:
        check_model(self._config.model, key, value, self._log.tracker.runs)
        named = run_and_choice(value)
        if named is not None:
            return plan_of_run(self._log.tracker.runs, *named)
        return read_plan(str(value) if isinstance(value, int) else value)


def _is_place(value: Any) -> bool:
    """Whether ``value`` names a run, a file or a folder with a plan, and is no plan itself."""
    places = run_and_choice, folder_of, lambda text: file_and_choice(str(text))
    return any(find(value) is not None for find in places)


def _bare(given: KVPlan | FittedPlan) -> KVPlan:
    return given.plan if isinstance(given, FittedPlan) else given

"""What a worker of a sweep loads: the same scorer that the sweep would use in its own process.

Workers are started with the name of `make_score` and the text of `settings_of`. A worker whose
model, text or fits are not those of the sweep refuses to work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from kvsharer_exp.cli.config.compose import to_config, to_yaml
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.plan_candidates import fits_of
from kvsharer_exp.cli.steps.sweep_setup import digest_of, identity_of, staged_scorer
from kvsharer_exp.measure.fits import Fits, fingerprints
from kvsharer_exp.search.spaces.registry import is_for_plans
from kvsharer_exp.search.stages import StagedScorer
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

MAKE = f"{__name__}:make_score"


class WorkerLog:
    """Says what a worker does, in its log; it has no run of its own."""

    def say(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")


def settings_of(config: Config, identity: dict[str, Any], fits: Fits) -> str:
    """The text that `make_score` takes, of a sweep with this configuration, identity and ``fits``.

    Paths stay as they were typed, for the identity is made of them; the folder says what they mean.
    Of the fits it has the fingerprints: a worker reads the numbers from the cache folder.
    """
    return json.dumps(
        {
            "config": to_yaml(config),
            "identity": digest_of(identity),
            "fits": fingerprints(fits),
            "folder": str(Path.cwd()),
        }
    )


def make_score(settings: str) -> StagedScorer:
    """Load model, text and fits; relative paths are those of the sweep's folder, if it is here.

    Raises:
        InputError: they are not those of the sweep.
    """
    given = json.loads(settings)
    if Path(given["folder"]).is_dir():
        os.chdir(given["folder"])
    config = to_config(OmegaConf.create(given["config"]))
    log = cast(RunLog, WorkerLog())
    loaded = LoadedModel(config, log)
    windows = Windows(config, loaded)
    of_plans = is_for_plans(config.search_space.kind)
    if digest_of(identity_of(config, loaded, windows, plans=of_plans)) != given["identity"]:
        raise InputError(
            "a worker has another model or text than the sweep: give every node the same files"
        )
    calibration = Calibration(config, loaded, windows)
    scorers = Scorers(config, log, loaded, windows, calibration)
    plans = Plans(config, log, loaded, windows)
    fits = fits_of(config, loaded, plans) if of_plans else {}
    _check_fits(fingerprints(fits), given["fits"])
    return staged_scorer(config, loaded, scorers, fits)


def _check_fits(held: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Refuse fits that are not those of the sweep, which may be made elsewhere by other code."""
    names = {**given, **held}
    other = [name for name in names if held.get(name) != given.get(name)]
    if other:
        raise InputError(
            f"a worker has another fit for {clip(other[0], 40)} than the sweep ({len(other)} of "
            f"{len(names)} differ): give every node one KVSHARER_CACHE and one kvsharer_exp"
        )

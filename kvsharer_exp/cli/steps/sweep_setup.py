"""Set up a ``sweep``: its study, the maps that it starts from, its search space and its scorer.

The functions stand in the order in which the command calls them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from kvsharer_exp.cli.config.plans import FootprintConfig
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.plan_candidates import PlanParts
from kvsharer_exp.measure.fits import Fits, with_fits
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.search.bars import Bars
from kvsharer_exp.search.coordinator import Search
from kvsharer_exp.search.samplers import STRATEGIES, make_sampler
from kvsharer_exp.search.seeds import make_seeds
from kvsharer_exp.search.spaces.base import SearchSpace, encoded
from kvsharer_exp.search.spaces.layer_actions import LayerActions
from kvsharer_exp.search.spaces.registry import make_space
from kvsharer_exp.search.stages import StagedScorer
from kvsharer_exp.search.study_store import Seed, StudyStore
from kvsharer_exp.tracking.leftovers import STUDY_KEY
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan


def identity_of(
    config: Config, loaded: LoadedModel, windows: Windows, *, plans: bool = False
) -> dict[str, Any]:
    """What must be the same for two scores to be comparable, as JSON values.

    It holds the model, the texts, the settings of the search and of its scores, and the seed; of a
    search of ``plans`` also how they are fitted, and where their memory is compared. Settings that
    came later are left out at their defaults, so that older studies go on.
    """
    compression = asdict(config.compression)
    for key in ("kv", "kv_gib"):  # a study answers any budget, so they do not change it
        del compression[key]
    identity = {
        "model": {key: str(value) for key, value in loaded.description.items()},
        "texts": windows.texts.fingerprints,
        "calibration": asdict(config.calibration),
        "compression": compression,
        "search": asdict(config.search),
        "search_space": asdict(config.search_space),
        "sampler": asdict(config.sampler),
        "screen": [config.study.screen_windows, config.study.margin],
        "windows": [config.scoring.num_windows, config.scoring.window_tokens],
        **({"prompt": prompt} if (prompt := config.scoring.prompt_tokens) else {}),
        **({"recall": True} if config.scoring.recall else {}),
        **({"task_metadata": given} if (given := config.scoring.task_metadata) else {}),
        "fitness": config.scoring.fitness,
        "search_tasks": asdict(config.scoring.search),
        "seed": config.seed,
    }
    if config.model.add_bos_token is not None:
        identity["add_bos_token"] = config.model.add_bos_token
    if plans:
        identity["fit"] = asdict(config.fit)
    if plans or config.footprint != FootprintConfig():
        identity["footprint"] = asdict(config.footprint)
    # A configuration may have whole numbers as keys, as in options.fixed. JSON has them as text.
    as_stored: dict[str, Any] = json.loads(json.dumps(identity))
    return as_stored


def study_name(config: Config, identity: dict[str, Any]) -> str:
    """Make the name of a study that was given none. The same identity gives the same name."""
    digest = digest_of(identity)[:8]
    return "-".join((config.model.name, config.search_space.kind, config.sampler.kind, digest))


def digest_of(identity: dict[str, Any]) -> str:
    """A text that is the same for the same identity only."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def start_sweep(log: RunLog, loaded: LoadedModel, windows: Windows, store: StudyStore) -> None:
    """Begin the MLflow run, or continue the run of the study if it has one.

    What earlier starts of the study left open in MLflow is ended, because they were killed.
    """
    before = store.mlflow_run_id
    known = before if before and log.tracker.exists(before) else None
    tags = {"study": store.name, STUDY_KEY: store.key}
    log.start(loaded.description, windows.texts, run_id=known, **tags)
    store.mlflow_run_id = log.run_id
    log.tracker.close_left_open(store.key, log.run_id, store.map_runs().values())
    if known:
        log.say(f"continuing study {store.name}: {len(store.results())} maps known")


def sweep_seeds(
    config: Config, log: RunLog, calibration: Calibration, store: StudyStore
) -> list[Seed]:
    """The paper's maps, likely ones and simple layouts (`make_seeds`), made once per study."""
    if store.seeds is None:
        store.seeds = make_seeds(
            calibration.ranking,
            calibration.error_walker(),
            lambda order, ratios, most: calibration.walk(log, order, ratios, max_candidates=most),
            config.compression.ratios,
        )
    return store.seeds or []


def solved_seeds(log: RunLog, space: SearchSpace, seeds: Sequence[Seed]) -> list[Seed]:
    """In a space of plans, the plans that are best if block errors are losses that add up.

    They come before the other ``seeds``: one for each budget asked for, and some between.
    """
    if not isinstance(space, LayerActions):
        return list(seeds)
    solved = space.seeds()
    log.say(
        f"solved {len(solved.plans)} plans before the first trial, at most {solved.gap:.1%} above "
        "the bound of their block errors"
    )
    return [*[("solved", plan) for plan in solved.plans], *seeds]


def sweep_space(
    config: Config,
    calibration: Calibration,
    max_shared: int,
    seeds: Sequence[Seed],
    parts: PlanParts | None = None,
) -> SearchSpace:
    """Make the search space; it holds the ``seeds`` where it can. ``parts``: those of plans."""
    evaluator = calibration.text.evaluator
    return make_space(
        config.search_space.kind,
        calibration.ranking,
        max_shared=max_shared,
        seeds=[m for m in (KVPlan.of(seed).sharing_map for _, seed in seeds) if m is not None],
        rank=calibration.rank_by,
        advance=evaluator.advance if config.search.acceptance else None,
        reset=evaluator.reset,
        candidates=parts.candidates if parts else (),
        budgets=parts.budgets if parts else (),
        **config.search_space.options,
    )


def say_left_out(config: Config, log: RunLog, space: SearchSpace, given: Sequence[Seed]) -> None:
    """Say how many maps of ``study.seeds`` the space does not hold."""
    outside = sum(encoded(space, KVPlan.of(seed)) is None for _, seed in given)
    if outside:
        log.say(
            f"{outside} of {len(given)} maps of study.seeds are left out: "
            f"{config.search_space.kind} does not hold them"
        )


def say_short_screens(config: Config, log: RunLog, num_windows: int) -> None:
    """Say which of ``study.screen_windows`` count for nothing beside ``num_windows`` in all."""
    if left_out := [count for count in config.study.screen_windows if count >= num_windows]:
        log.say(
            f"left out of study.screen_windows: {', '.join(map(str, left_out))}, for there are "
            f"{num_windows} scoring windows"
        )


def sweep_search(
    config: Config,
    loaded: LoadedModel,
    calibration: Calibration,
    scorer: StagedScorer,
    store: StudyStore,
    space: SearchSpace,
    seeds: Sequence[Seed],
) -> Search:
    """Make what the study runs."""
    sampler = make_sampler(
        config.sampler.kind,
        space=space,
        seed=config.seed,
        trials_so_far=store.count_trials(),
        errors=calibration.text.block_errors if config.sampler.kind in STRATEGIES else None,
        **config.sampler.options,
    )

    def size(plan: KVPlan) -> Footprint:
        return footprint(loaded.model, plan, context=config.footprint.context)

    return Search(space, sampler, size, seeds, Bars(scorer.screens, config.study.margin))


def staged_scorer(
    config: Config, loaded: LoadedModel, scorers: Scorers, fits: Fits
) -> StagedScorer:
    """Make what scores the plans, here or in a worker. ``fits``: those that plans may need."""
    return StagedScorer(
        loaded.model,
        scorers.fitness,
        fitness=config.scoring.weights,
        tasks=scorers.search_tasks,
        screen_windows=config.study.screen_windows,
        together=config.scoring.maps_per_forward,
        fitted=partial(with_fits, fits=fits),
    )

"""Measure what a search of plans may choose from, before its first trial.

The command ``sweep`` calls `PlanParts.make` for a search space of plans. Stand-ins of all layers
are fitted in one pass over the fit windows. The block error of every action is measured on scoring
windows, which the fits have not seen. Reads are the pairs of least block error, and those of maps
among the seeds. Halves are keys and values of two of the former.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import ERROR_WINDOWS, Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.measure.action_errors import action_errors
from kvsharer_exp.measure.fits import Fits, with_fits
from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.actions.sizes import BUDGET_SIZE
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.search.candidates import (
    HALVES,
    READ,
    Candidate,
    fixed_layers,
    full_bytes,
    smallest,
    wanted_actions,
)
from kvsharer_exp.search.spaces.layer_actions import ACTIONS
from kvsharer_exp.search.study_store import Seed, StudyStore
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan

DEFAULT_KV = (0.15, 0.1875, 0.22, 0.25, 0.3125)
CLOSE = 1e-9
"""Shares are quotients of bytes: this much above a budget is rounding."""
Costs = dict[tuple[int, Action], float]
"""By layer and action the block error."""
SOURCES = 3
"""How many pairs of least block error a layer may read, where nothing else is said."""


@dataclass(frozen=True)
class PlanParts:
    """The candidates of a search of plans, the fits of its stand-ins, and the budgets asked for."""

    candidates: tuple[Candidate, ...]
    fits: Fits
    budgets: tuple[float, ...]

    @classmethod
    def make(
        cls,
        config: Config,
        log: RunLog,
        loaded: LoadedModel,
        windows: Windows,
        calibration: Calibration,
        fits: Fits,
        store: StudyStore,
        seeds: Sequence[Seed],
    ) -> PlanParts:
        """Measure block errors; what the study keeps is not measured again.

        ``fits``: those of `fits_of`.

        Raises:
            InputError: an action is unknown, or a budget cannot be met.
        """
        options = config.search_space.options
        allowed = _allowed(loaded, options)
        if store.candidates is None:
            asked = {i: [a for a in of if a != Own()] for i, of in allowed.items()}
            texts, count = options.get("actions", ACTIONS), int(options.get("sources", SOURCES))
            fixed = fixed_layers(options.get("fixed"))
            if HALVES in texts:
                for i, halves in mixed_reads(calibration.text.block_errors, count, fixed).items():
                    asked[i] += halves
            log.say(f"measuring the block errors of {sum(map(len, asked.values()))} actions")
            errors = errors_of(config, loaded, windows.fitness[:ERROR_WINDOWS], asked, fits)
            errors |= {(i, Own()): 0.0 for i, of in allowed.items() if Own() in of}
            if READ in texts:
                errors |= least_reads(calibration.text.block_errors, count, seeds, fixed)
            kept = partial(_bytes, loaded, context=config.footprint.context)
            store.candidates = [
                Candidate(i, action, error, kept(i, action), kept(i, Own()))
                for (i, action), error in errors.items()
                if math.isfinite(error)
            ]
        candidates = tuple(store.candidates or ())
        full = full_bytes(candidates)
        return cls(candidates, fits, budgets_of(config, full, smallest(candidates) / full))

    def fitted(self, plan: KVPlan) -> FittedPlan:
        """``plan`` with the fits of its stand-ins."""
        return with_fits(plan, self.fits)


def fits_of(config: Config, loaded: LoadedModel, plans: Plans) -> Fits:
    """The fits of all stand-ins that a search of plans may use, as `PlanParts` has them.

    Raises:
        InputError: an action is unknown, or there is too little text.
    """
    return plans.fits(fitted_among(_allowed(loaded, config.search_space.options)))


def wanted(config: Config, loaded: LoadedModel) -> set[Action]:
    """Every action but reads that a search of plans may use.

    Raises:
        InputError: an action is unknown, or a layer is left nothing to do.
    """
    return {a for of in _allowed(loaded, config.search_space.options).values() for a in of}


def fitted_among(actions: Mapping[int, Sequence[Action]]) -> dict[int, list[Action]]:
    """By layer those of ``actions`` that need fits, where there are some."""
    fitted = {i: [a for a in of if a.fitted] for i, of in actions.items()}
    return {i: of for i, of in fitted.items() if of}


def errors_of(
    config: Config,
    loaded: LoadedModel,
    text: torch.Tensor,
    actions: Mapping[int, Sequence[Action]],
    fits: Fits,
) -> Costs:
    """The block errors of the ``actions`` of each layer on windows of ``text``, as scored."""
    measured = action_errors(
        loaded.model,
        text,
        {i: [(a, fits.get((i, a))) for a in of] for i, of in actions.items()},
        batch_size=config.scoring.batch_size,
        prompt=config.scoring.prompt_tokens,
    )
    return {
        (i, action): error
        for i, of in actions.items()
        for action, error in zip(of, measured[i], strict=True)
    }


def _allowed(loaded: LoadedModel, options: dict[str, Any]) -> dict[int, list[Action]]:
    """By layer the actions but reads that the options name and the layer can do."""
    fixed, texts = fixed_layers(options.get("fixed")), options.get("actions", ACTIONS)
    if beyond := sorted(fixed.keys() - {layer.index for layer in loaded.layers}):
        raise InputError(
            f"search_space.options.fixed names layer {beyond[0]}: give layers from 0 to "
            f"{loaded.num_layers - 1}"
        )
    found: dict[int, list[Action]] = {}
    refused: list[SharingError] = []
    for layer in loaded.layers:
        found[layer.index] = []
        for action in wanted_actions(layer.index, texts, fixed):
            try:
                runner_of(action).check(layer, loaded.layers)
            except SharingError as error:
                refused.append(error)
            else:
                found[layer.index].append(action)
        if not found[layer.index]:
            raise (
                refused[-1]
                if refused
                else InputError(
                    f"search_space.options.actions leaves layer {layer.index} nothing to do: "
                    "give own, q4, x, c or a beside read"
                )
            )
    return found


def check_keeps(config: Config, loaded: LoadedModel, windows: Windows) -> None:
    """Refuse keeps that hold more than half of the tokens of a scoring window or prompt.

    What they lose at a longer context would not be seen.

    Raises:
        InputError: a keep does.
    """
    tokens = config.scoring.prompt_tokens or windows.fitness.shape[1]
    for action in sorted(wanted(config, loaded), key=str):
        if isinstance(action, Own) and action.keep and 2 * action.keep.held(tokens) > tokens:
            raise InputError(
                f"{action.keep} holds most of the {tokens} tokens that are scored, so it would "
                "look cheaper than it is: give windows of twice what it holds, or let it hold less"
            )


def least_reads(
    errors: Sequence[Sequence[float]], count: int, seeds: Sequence[Seed], fixed: dict[int, str]
) -> Costs:
    """The pairs that plans may read: ``count`` a layer of least error, and those of the seeds."""
    wanted = {(target, s) for target, row in enumerate(errors) for s in _least(row, count)}
    for _, seed in seeds:
        sources = KVPlan.of(seed).key_sources
        wanted |= {(t, s) for t, s in enumerate(sources) if s is not None and s != t}
    return {(t, Read(s)): errors[t][s] for t, s in sorted(wanted) if t not in fixed}


def mixed_reads(
    errors: Sequence[Sequence[float]], count: int, fixed: dict[int, str]
) -> dict[int, list[Action]]:
    """By layer, keys of one and values of another of its ``count`` sources of least error."""
    return {
        target: [ReadKV(keys, values) for keys, values in permutations(_least(row, count), 2)]
        for target, row in enumerate(errors)
        if target not in fixed
    }


def _least(row: Sequence[float], count: int) -> list[int]:
    able = [source for source, error in enumerate(row) if math.isfinite(error)]
    return sorted(able, key=lambda source: row[source])[:count]


def _bytes(loaded: LoadedModel, layer: int, action: Action, context: int) -> int:
    return runner_of(action).kv_bytes(loaded.layers[layer], context, BUDGET_SIZE)


def budgets_of(config: Config, full: int, least: float) -> tuple[float, ...]:
    """The budgets asked for, as shares of the ``full`` cache's bytes at the context.

    ``least`` is the share that the smallest plan keeps.

    Raises:
        InputError: one is below what the smallest plan keeps, or above the full cache.
    """
    wanted, footprint = config.compression, config.footprint
    if wanted.kv_gib is not None:
        gib = full * footprint.batch / 2**30
        share = wanted.kv_gib / gib
        if not least - CLOSE <= share <= 1 + CLOSE:
            raise InputError(
                f"compression.kv_gib={wanted.kv_gib:g} cannot be met at footprint.context="
                f"{footprint.context} and batch={footprint.batch}: give {least * gib:.3g} to "
                f"{gib:.3g}"
            )
        return (share,)
    if wanted.kv is None:
        default = tuple(share for share in DEFAULT_KV if share >= least)
        return default or tuple(sorted({least, (1 + least) / 2}))
    for share in wanted.kv:
        if share < least - CLOSE:
            raise InputError(
                f"compression.kv={share:g} is below the smallest plan of these actions: "
                f"give at least {math.ceil(least * 1000) / 1000:g}"
            )
    return tuple(sorted(wanted.kv))

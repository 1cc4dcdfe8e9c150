"""Run the arms of an ablation that choose KV plans: what else could be done with a map's bytes.

The command ``ablate`` asks `PlanArms` for the arms in `PLAN_ARMS`. At every ratio, ``read`` is the
map whose pairs have least block error, and sets the budget: no other plan keeps more bytes, counted
in 16 bits at ``footprint.context``. ``drop``, ``constant`` and ``affine`` leave as many layers
without KV as that map has targets. ``quantised`` has every layer keep its KV, in fewer bits;
``windowed``, ``snapkv`` and ``h2o`` that of fewer tokens; ``joint`` may do any of these. All choose
by block errors, which are taken to add up, on text that no stand-in was fitted on. They do not
quite add up, so ``joint`` is scored beside the best plans of single arms, and the best of them is
its plan. The arms in `EVICTING` let go of tokens beside the paper's map, or alone, and have no
budget.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import ERROR_WINDOWS, Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.steps.ablation_actions import EVICTING, arm_actions, evicting
from kvsharer_exp.cli.steps.plan_candidates import (
    SOURCES,
    Costs,
    errors_of,
    fitted_among,
    least_reads,
)
from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.actions.sizes import BUDGET_SIZE
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.search.candidates import Candidate, priced
from kvsharer_exp.search.paper.arms import JOINT, READ, SINGLE, WITHOUT_KV
from kvsharer_exp.search.solver import solve_with_reads
from kvsharer_exp.search.without_kv import without_kv
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

_RIVALS = 3
"""So many plans of single arms, those of least block error, are scored beside the joint one."""

Chosen = tuple[GreedyResult, FittedPlan]
"""What an arm chose at one ratio. Of a plan that is no map the result names no sources."""


class PlanArms:
    """The arms that choose plans, on the text of one `Calibration`.

    ``once`` gives the JSON value of a key, which it makes if it is not kept (`AblationMemory`).
    """

    def __init__(
        self,
        log: RunLog,
        loaded: LoadedModel,
        calibration: Calibration,
        scorers: Scorers,
        once: Callable[[list[Any], Callable[[], Any]], Any] = lambda key, make: make(),
    ) -> None:
        self._log, self._loaded, self._calibration = log, loaded, calibration
        self._scorers, self._once = scorers, once
        self._windows = calibration.text.windows
        self._plans = Plans(calibration.config, log, loaded, self._windows)
        self._maps: dict[tuple[float, ...], list[GreedyResult]] = {}
        self._errors: Costs = {}
        self._losses: dict[KVPlan, float] = {}
        self._walked: list[GreedyResult] = []

    def varied(self, calibration: Calibration) -> PlanArms:
        """The arms on another calibration: these, if its text is the same."""
        if calibration.text is self._calibration.text:
            self._calibration, self._walked = calibration, []
            return self
        return PlanArms(self._log, self._loaded, calibration, self._scorers, self._once)

    def require(self, arms: Sequence[str]) -> None:
        """Refuse text that is too short for these ``arms``, before model time is spent.

        Raises:
            InputError: there are too few windows for fits, or none to measure block errors on.
        """
        actions = [action for arm in arms for action in self._actions(arm)]
        if actions:
            _ = self._text
        if any(action.fitted for action in actions):
            _ = self._plans.origin  # names the fit windows, and so refuses too few of them

    def run(self, arm: str, ratios: Sequence[float]) -> list[Chosen]:
        """Choose the arm's plan at each of ``ratios``.

        ``requested`` and ``found`` of a result are numbers of layers without KV of their own;
        an arm whose layers keep some of it has the ``found`` of the map whose bytes it does not
        exceed. ``found`` is 0 where no plan of the arm is that small; the full cache then stands
        for the plan.

        Raises:
            InputError: a ratio asks for zero or all layers, or the text is too short.
        """
        if arm in EVICTING:
            return self._evicting(arm, ratios)
        maps = self._least_error_maps(ratios)
        if arm == READ:
            return [(r, FittedPlan.of(SharingMap(r.kv_source_layers))) for r in maps]
        began = time.perf_counter()
        choose = self._best_of if arm == JOINT else self._choose
        plans = [choose(arm, SharingMap(r.kv_source_layers)) for r in maps]
        if arm == JOINT:  # the held-out windows need the memory of its states
            self._scorers.fitness.reset()
        fitted = [None if plan is None else self._plans.fit(plan) for plan in plans]
        seconds = time.perf_counter() - began
        return [self._chosen(read, plan, seconds) for read, plan in zip(maps, fitted, strict=True)]

    def fit(self, plan: KVPlan) -> FittedPlan:
        """``plan`` with its fits, which are in the cache folder once they were made."""
        return self._plans.fit(plan)

    def _least_error_maps(self, ratios: Sequence[float]) -> list[GreedyResult]:
        """The maps that read the pairs of least block error; they cost block errors only."""
        key = tuple(ratios)
        if key not in self._maps:
            began = time.perf_counter()
            found = self._calibration.error_walker().run("similar_untested", ratios)
            seconds = time.perf_counter() - began
            self._maps[key] = [
                GreedyResult(
                    r.compression, r.requested, r.found, r.kv_source_layers, 0, seconds, ()
                )
                for r in found
            ]
        return self._maps[key]

    def _evicting(self, arm: str, ratios: Sequence[float]) -> list[Chosen]:
        """The paper's maps, or the full cache, whose owners let go of some tokens.

        Layers with a sliding window of the model's own go on as they do.
        """
        beside_map, _ = EVICTING[arm]
        if not self._walked and beside_map:
            most = self._calibration.config.ablate.max_candidates
            walker = self._calibration.walker(max_candidates=most)
            seed = self._calibration.config.seed
            self._walked = walker.run("dissimilar_tested", ratios, seed=seed)
        some = self._actions(arm)[0]
        able = {i for i in range(self._loaded.num_layers) if self._can(i, some)}
        found: list[Chosen] = []
        for place, ratio in enumerate(ratios):
            result = GreedyResult(ratio, 1, 1, (), 0, 0.0, ())
            plan = KVPlan.full(self._loaded.num_layers)
            if beside_map:
                result = self._walked[place]
                plan = KVPlan.of(SharingMap(result.kv_source_layers))
            found.append((result, FittedPlan(evicting(arm, plan, able))))
        return found

    def _chosen(self, read: GreedyResult, plan: FittedPlan | None, seconds: float) -> Chosen:
        full = self._loaded.full_cache
        found, sources = (read.found, ()) if plan else (0, full.kv_source_layers)
        result = GreedyResult(read.compression, read.requested, found, sources, 0, seconds, ())
        return result, plan or FittedPlan.of(full)

    @property
    def _text(self) -> torch.Tensor:
        """The windows that block errors are measured on, which the fits have not seen.

        Raises:
            InputError: the text gives none.
        """
        windows = self._windows
        text = windows.scoring
        if not len(text):
            text = windows.beside_fits(windows.calibration)
        if not len(text):
            raise InputError(
                "calibration.path leaves no window to measure block errors on beside the fit "
                "windows: give more text, or lower fit.num_windows"
            )
        return text[:ERROR_WINDOWS]

    def _errors_of(self, arm: str) -> Costs:
        """The block errors of the arm's actions, without those that a layer cannot do."""
        actions = self._actions(arm)
        asked = [(i, action) for i in range(self._loaded.num_layers) for action in actions]
        new: dict[int, list[Action]] = {}
        for i, action in asked:
            if (i, action) not in self._errors and self._can(i, action):
                new.setdefault(i, []).append(action)
        if new:
            self._measure(new)
        found = {one: self._errors.get(one, math.inf) for one in asked}
        return {one: error for one, error in found.items() if math.isfinite(error)}

    def _measure(self, actions: dict[int, list[Action]]) -> None:
        """Measure the block errors of the ``actions`` of each layer."""
        wanted = fitted_among(actions)
        fits = self._plans.fits(wanted) if wanted else {}
        text = self._text

        def measure() -> list[float]:
            config = self._calibration.config
            return [*errors_of(config, self._loaded, text, actions, fits).values()]

        each = [(i, action) for i, of in actions.items() for action in of]
        asked = [
            [i, action.text(i), fits[i, action].fingerprint if action.fitted else ""]
            for i, action in each
        ]
        digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()[:12]
        errors = self._once(["errors", digest, asked], measure)
        self._errors |= zip(each, errors, strict=True)

    def _can(self, index: int, action: Action) -> bool:
        layers = self._loaded.layers
        try:
            runner_of(action).check(layers[index], layers)
        except SharingError:
            return False
        return True

    def _best_of(self, arm: str, read: SharingMap) -> KVPlan | None:
        """The plan of ``arm``, or of a single arm if that scores better on the scoring windows."""
        found = {plan for single in SINGLE if (plan := self._choose(single, read)) is not None}
        errors = self._errors_of(arm)
        rivals = sorted(found, key=lambda plan: (_predicted(plan, errors), str(plan)))[:_RIVALS]
        own = self._choose(arm, read)
        return min([own, *rivals] if own else rivals, key=self._loss, default=None)

    def _loss(self, plan: KVPlan) -> float:
        if plan not in self._losses:
            try:
                self._losses[plan] = self._scorers.fitness.score(self._plans.fit(plan)).kl
            except NotFiniteError:
                self._losses[plan] = math.inf
        return self._losses[plan]

    def _choose(self, arm: str, read: SharingMap) -> KVPlan | None:
        """The arm's plan that keeps no more bytes than ``read``; None if no plan is that small."""
        if not read.targets:
            return None
        errors = self._errors_of(arm)
        budget = sum(self._bytes(i, Own()) for i in KVPlan.of(read).owners)
        losses: Costs = {(i, Own()): 0.0 for i in range(read.num_layers)}
        losses |= errors
        if arm == JOINT:
            losses |= least_reads(self._calibration.text.block_errors, SOURCES, [], {})
        candidates = [
            Candidate(i, action, error, self._bytes(i, action), self._bytes(i, Own()))
            for (i, action), error in losses.items()
        ]
        choices, sources = priced(candidates, losses)
        if arm in WITHOUT_KV:
            return without_kv(choices, len(read.targets), budget)
        try:
            return solve_with_reads(choices, sources, budget)[0].plan
        except InputError:  # the smallest plan keeps more
            return None

    def _actions(self, arm: str) -> tuple[Action, ...]:
        return arm_actions(arm, kept_of(self._calibration.config))

    @property
    def _context(self) -> int:
        return self._calibration.config.footprint.context

    def _bytes(self, index: int, action: Action) -> int:
        return runner_of(action).kv_bytes(self._loaded.layers[index], self._context, BUDGET_SIZE)


def kept_of(config: Config) -> int:
    """The tokens that arms keep shares of: those that are read before what is scored.

    At a shorter ``footprint.context`` they are its tokens. At a longer one a keep of more tokens
    would lose nothing of what is scored, and so would look better than it is.
    """
    scoring = config.scoring
    return min(config.footprint.context, scoring.prompt_tokens or scoring.window_tokens)


def _predicted(plan: KVPlan, errors: Mapping[tuple[int, Action], float]) -> float:
    return sum(errors.get((layer, action), 0.0) for layer, action in enumerate(plan.actions))

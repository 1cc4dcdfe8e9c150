"""Score a plan in vLLM beside this package's own runtime: ``evaluate engine=vllm``.

lm-eval asks a server, which is started and stopped here, for the log-likelihoods of the report
tasks, for the same tokens as it asked the model in this process. Then the two are compared item by
item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers, longest_request
from kvsharer_exp.cli.steps.engine_run import EngineRun
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.data.tasks import check_no_generation, without_generation
from kvsharer_exp.measure.held_out import HeldOutScores, score_tasks
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.reporting.front_table import number
from kvsharer_exp.shipping.vllm.likelihoods import LikelihoodClient
from kvsharer_exp.values.agreement import Agreement, agreement
from kvsharer_exp.values.comparisons import Comparison, compare
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.intervals import Interval
from kvsharer_exp.values.plan import KVPlan


class EngineScores:
    """Scores the report tasks in the engine.

    Everything that cannot be done is refused here, before model time is spent.

    Raises:
        InputError: there is no vLLM, it cannot run the plan or the model, or there is no task that
            generates no answers.
    """

    def __init__(
        self, config: Config, log: RunLog, loaded: LoadedModel, scorers: Scorers, plan: KVPlan
    ) -> None:
        tasks = scorers.load_tasks()[1]
        if not tasks:
            raise InputError(
                "engine=vllm scores tasks, and there are none: give "
                "scoring.report.tasks=[wiki_cloze]"
            )
        weighed = without_generation(tasks)
        if not weighed:
            check_no_generation(tasks)
        if len(weighed) < len(tasks):
            left_out = ", ".join(sorted(tasks.keys() - weighed.keys()))
            log.say(f"vLLM does not score {left_out}: it generates its answers")
        self._config, self._log, self._scorers = config, log, scorers
        self._engine = EngineRun(
            config, log, loaded, longest_request(loaded.model, config.serve.max_len)
        )
        self._engine.check(plan)

    def score(self, fitted: FittedPlan, here: HeldOutScores) -> dict[str, Any]:
        """Score ``fitted``, which the report tasks were last scored under; prints both sides.

        The loaded model is under the plan for good after this. ``here`` are the scores of the model
        in this process.

        Returns:
            What ``result.json`` says of the engine.
        """
        own = self._scorers.report_tasks
        assert own is not None
        with (
            self._engine.exports({"plan": fitted}) as exports,
            self._engine.serve(exports["plan"]) as server,
        ):
            client = LikelihoodClient(server.client.address, server.client.model)
            ask = partial(client.log_likelihoods, at_once=self._config.scoring.batch_size)
            engine = self._scorers.through(ask)
            assert engine is not None
            found = score_tasks(engine, seed=self._config.seed)
        self._log.say("scored the tasks in vLLM")
        agreements = agreement_by_task(own, engine)
        self._log.log_metrics({f"engine/{name}": value for name, value in found.scores.items()})
        for task, one in agreements.items():
            self._log.log_metrics(agreement_metrics(task, one))
        self._log.console.print(f"in {self._engine.environment}", markup=False)
        self._log.console.print(TurningTable.of(scores_table(here, found)))
        self._log.console.print(
            "In brackets: 95% intervals over the items; that of a difference is paired."
        )
        self._log.console.print(TurningTable.of(agreement_table(agreements)))
        return {
            "name": "vllm",
            "versions": self._engine.versions,
            "dtype": self._engine.dtype,
            "max_len": self._engine.max_len,
            "scores": found.scores,
            "intervals": found.ends,
            "agreement": {task: one.to_dict() for task, one in agreements.items()},
        }


def agreement_by_task(own: TaskScorer, engine: TaskScorer) -> dict[str, Agreement]:
    """Compare what two scorers of the same tasks last found, by task."""
    return {
        task: agreement(
            answers,
            engine.answers[task],
            scores=own.samples.get(task, []),
            other_scores=engine.samples.get(task, []),
        )
        for task, answers in own.answers.items()
    }


def agreement_metrics(task: str, found: Agreement) -> dict[str, float]:
    """What MLflow keeps of the agreement on ``task``: shares of the items, and nats."""
    shares = {"same_choice": found.same_choice, "same_score": found.same_score}
    return {
        **{f"engine/{task}/{k}": n / found.items for k, n in shares.items() if n is not None},
        f"engine/{task}/largest_difference": found.largest_difference,
    }


def scores_table(own: HeldOutScores, engine: HeldOutScores) -> list[list[str]]:
    """Header and a row for each score: in this process, in the engine, and the difference.

    Each is followed by its interval. A difference has one if the score is the mean of its items.
    """
    rows = [["score", "transformers", "vLLM", "difference"]]
    for name, value in engine.scores.items():
        inside = [_ends(side.intervals.get(name)) for side in (own, engine)]
        ours, theirs = (side.items.get(name, ()) for side in (engine, own))
        same = len(ours) == len(theirs) > 0 and math.isclose(fmean(ours), value, abs_tol=1e-9)
        rows.append(
            [
                name,
                f"{own.scores[name]:.6g}{inside[0]}",
                f"{value:.6g}{inside[1]}",
                f"{value - own.scores[name]:+.2g}{_ends(compare(ours, theirs) if same else None)}",
            ]
        )
    return rows


def _ends(inside: Interval | Comparison | None) -> str:
    return "" if inside is None else f" ({number(inside.low)}–{number(inside.high)})"


def agreement_table(found: Mapping[str, Agreement]) -> list[Sequence[str]]:
    """Header and a row for each task: on how many of its items the runtimes agree."""

    def of(count: int | None, items: int) -> str:
        return "–" if count is None else f"{count} of {items}"

    rows: list[Sequence[str]] = [["task", "same choice", "same score", "texts", "largest |Δ| nats"]]
    for task, one in found.items():
        counts = [of(one.same_choice, one.items), of(one.same_score, one.items)]
        rows.append([task, *counts, str(one.texts), f"{one.largest_difference:.2g}"])
    return rows

"""The command ``plan``: what a plan does, layer by layer, and what each layer's action costs.

The block error of an action is measured with this action alone in the full model, on windows that
the fits have not seen. ``compare=`` names another plan; the command then says where they differ.

With a budget (``compression.kv=`` or ``run=``) in place of a plan, the command names the best plan
for it that a finished sweep of plans knows or predicts. It then loads no model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.plan_words import (
    action_words,
    kind_of,
    memory_words,
    unseen_lines,
    unseen_words,
)
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import head, identify, tags_of, write_result
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import refuse_prompted
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.budget_plan import Answer, study_of, sweep_of_plans
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.measure.action_errors import action_errors
from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan

_WINDOWS = 8  # for block errors: more of them order actions no better


@dataclass(frozen=True, slots=True)
class LayerLine:
    """What one layer does. ``block_error`` is None where it overflows or there is no text for it.

    ``kv_bytes`` are those of ``footprint.batch`` sequences of ``footprint.context`` tokens.
    """

    layer: int
    action: str
    text: str
    words: str
    kv_bytes: int
    block_error: float | None
    parameter_bytes_saved: int


def run(config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, plans: Plans) -> None:
    """Print the plan layer by layer, or the plan for each budget, and write ``result.json``."""
    if _asks_for_budgets(config):
        _answer_budgets(config, log)
        return
    plan, other = plans.plan, plans.other
    plans.check()
    text = _unseen(windows)
    if len(text) and config.scoring.prompt_tokens is None:
        for one in (plan, *(() if other is None else (other,))):
            for layer, action in enumerate(one.actions):
                refuse_prompted([action], f"the block error of layer {layer}")
    log.start(loaded.description, windows.texts, **tags_of(plan))
    loaded.tell_contexts()
    fitted = plans.fitted
    plans.keep(fitted)
    if not len(text):
        log.say("the calibration text has no window that the fits have not seen: no block errors")
    else:
        key = "scoring.window_tokens" if len(windows.scoring) else "calibration.window_tokens"
        for line in unseen_lines(plan, key, text.shape[1], config.scoring.prompt_tokens):
            log.say(line)
    lines = _lines(config, loaded, fitted, text)
    size = footprint(loaded.model, plan, context=config.footprint.context)
    log.console.print(f"{kind_of(plan)} {plan}")
    log.console.print(_table(config, lines))
    log.console.print(_totals(config, plan, size, lines))
    log.console.print(_flops(loaded, size))
    result = {**identify(plan), **_as_result(config, size, lines)}
    log.log_metrics(
        {"kv_fraction": size.kv_fraction, "kv_bytes_per_token": size.kv_bytes_per_token}
    )
    if other is not None:
        fitted_other = plans.other_fitted
        assert fitted_other is not None
        others = _lines(config, loaded, fitted_other, text)
        other_size = footprint(loaded.model, other, context=config.footprint.context)
        _show_difference(config, log, (plan, size, lines), (other, other_size, others))
        result["compare"] = {**identify(other), **_as_result(config, other_size, others)}
    log.finish(result, then=next_command(config, "evaluate", plans.word))


def _unseen(windows: Windows) -> torch.Tensor:
    """A few windows of the calibration text that hold no text of the fit windows."""
    scoring = windows.scoring
    if len(scoring):
        return scoring[:_WINDOWS]
    return windows.beside_fits(windows.calibration)[:_WINDOWS]


def _lines(
    config: Config, loaded: LoadedModel, fitted: FittedPlan, text: torch.Tensor
) -> list[LayerLine]:
    plan = fitted.plan
    changed = {
        layer: [(action, fitted.fits.get(layer))]
        for layer, action in enumerate(plan.actions)
        if plan.texts[layer] != str(layer)
    }
    errors: dict[int, list[float]] = {}
    if len(text):
        scoring = config.scoring
        errors = action_errors(
            loaded.model,
            text,
            changed,
            batch_size=scoring.batch_size,
            prompt=scoring.prompt_tokens,
        )
    wanted, lines = config.footprint, []
    for layer, action in zip(loaded.layers, plan.actions, strict=True):
        index, runner = layer.index, runner_of(action)
        error = errors[index][0] if index in errors else 0.0 if index not in changed else math.inf
        held = runner.kv_bytes(layer, wanted.context, layer.element_size)
        lines.append(
            LayerLine(
                index,
                action.name,
                plan.texts[index],
                action_words(action, index),
                wanted.batch * held,
                error if math.isfinite(error) else None,
                runner.parameter_bytes(layer),
            )
        )
    return lines


def _as_result(config: Config, size: Footprint, lines: list[LayerLine]) -> dict[str, Any]:
    return {
        "footprint": size.to_dict(),
        "batch": config.footprint.batch,
        "kv_bytes": sum(line.kv_bytes for line in lines),
        "layers": [asdict(line) for line in lines],
    }


def _table(config: Config, lines: list[LayerLine]) -> TurningTable:
    table = TurningTable("layer", "action", "in words", "KV bytes", "block error", "saved bytes")
    for line in lines:
        table.add_row(
            str(line.layer),
            line.text,
            line.words,
            f"{line.kv_bytes:,}",
            _error(line),
            f"{line.parameter_bytes_saved:,}",
        )
    return table


def _error(line: LayerLine) -> str:
    return "–" if line.block_error is None else f"{line.block_error:.3g}"


def _flops(loaded: LoadedModel, size: Footprint) -> str:
    whole = footprint(loaded.model, loaded.full_cache, context=size.context).attention_flops
    return (
        f"Attention takes {size.attention_flops:,} FLOPs for the next token, "
        f"{size.attention_flops / whole:.1%} of the full cache's."
    )


def _totals(config: Config, plan: KVPlan, size: Footprint, lines: list[LayerLine]) -> str:
    held, wanted = sum(line.kv_bytes for line in lines), config.footprint
    many = "sequence" if wanted.batch == 1 else "sequences"
    unseen = unseen_words(plan, wanted.context)
    return (
        f"{held:,} KV bytes for {wanted.batch} {many} of {wanted.context} tokens. "
        f"{memory_words(plan, size)}" + (f"\n{unseen}" if unseen else "")
    )


Side = tuple[KVPlan, Footprint, list[LayerLine]]


def _show_difference(config: Config, log: RunLog, one: Side, other: Side) -> None:
    """Print the layers in which two plans differ, and the differences of their totals."""
    (plan, size, lines), (other_plan, other_size, other_lines) = one, other
    log.console.print(f"\ncompared with the {kind_of(other_plan)} {other_plan}")
    pairs = [p for p in zip(lines, other_lines, strict=True) if p[0].text != p[1].text]
    if not pairs:
        log.console.print("The two plans are the same.")
        return
    table = TurningTable("layer", "action", "other", "KV bytes", "block error", "saved bytes")
    for mine, its in pairs:
        table.add_row(
            str(mine.layer),
            mine.text,
            its.text,
            f"{its.kv_bytes - mine.kv_bytes:+,}",
            f"{_error(mine)} → {_error(its)}",
            f"{its.parameter_bytes_saved - mine.parameter_bytes_saved:+,}",
        )
    log.console.print(table)
    log.console.print(_totals(config, other_plan, other_size, other_lines))
    kv = sum(line.kv_bytes for line in other_lines) - sum(line.kv_bytes for line in lines)
    log.console.print(
        f"The other plan keeps {abs(kv):,} KV bytes {'more' if kv > 0 else 'less'} "
        f"({other_size.kv_fraction - size.kv_fraction:+.1%} of full) and differs in "
        f"{len(pairs)} of {plan.num_layers} layers."
    )


def _asks_for_budgets(config: Config) -> bool:
    """Whether plans for budgets are asked, and not what a plan does.

    Raises:
        InputError: both are asked.
    """
    wanted = config.compression
    asked = {"run": config.run, "compression.kv": wanted.kv, "compression.kv_gib": wanted.kv_gib}
    given = {"plan": config.plan, "map": config.map, "compare": config.compare}
    budget = next((key for key, value in asked.items() if value is not None), None)
    plan = next((key for key, value in given.items() if value is not None), None)
    if budget and plan:
        raise InputError(
            f"{plan}= and {budget}= are both given: give a plan to see what it does, or a budget "
            "to be given a plan"
        )
    return budget is not None


def _answer_budgets(config: Config, log: RunLog) -> None:
    """Print a line for each budget, and write ``result.json``."""
    run = sweep_of_plans(config)
    context = int((run.config.get("footprint") or {}).get("context") or config.footprint.context)
    with study_of(config, run) as study:
        answers = [study.within(kv) for kv in study.budgets(config, context)]
        count = len(study.results)
    about = {"model": run.model, "runs": run.run_id, "study": str(run.result["study"])}
    log.run_id = log.tracker.start_run(
        f"{run.model} · {config.command}",
        tags={"command": config.command, **about, "model_id": str(run.result["model"]["id"])},
        params={"runs": run.run_id, "seed": str(config.seed)},
    )
    console = log.console
    console.print(
        f"from {count} plans of {run.title}, run {run.run_id}; shares of the full cache's KV "
        f"bytes at {context} tokens",
        markup=False,
    )
    for answer in answers:
        line = f"{answer.kv:.4g}  {_status(run, answer)}, keeps {answer.kv_fraction:.2%}: "
        console.print(f"{line}{answer.plan}", markup=False, soft_wrap=True)
        if answer.solved is not None:
            cost, bound = answer.solved.loss, answer.bound
            gap = f"{answer.solved.gap(bound):.2%} above the bound of {bound:.4g}"
            console.print(f"      solved for an expected {cost:.4g}, {gap}", markup=False)
    result = {
        **head(
            config,
            model=run.result["model"],
            seconds=log.seconds,
            mlflow_run_id=log.run_id,
            versions=log.environment,
        ),
        "run": run.run_id,
        "study": about["study"],
        "budgets": [answer.to_dict() for answer in answers],
    }
    log.tracker.log_text(log.run_id, write_result(log.folder, result), "result.json")
    console.print(f"\nresult   {log.folder / 'result.json'}", markup=False)
    if config.quiet:
        return
    console.print(f"mlflow   {log.tracker.run_url(log.run_id)}   (kvsharer ui shows it)")
    then = next((answer for answer in answers if answer.status == "predicted"), answers[0])
    words = f"kvsharer evaluate model={run.model} {kind_of(then.plan)}={then.plan}"
    console.print(f"next     {words}", markup=False, soft_wrap=True)


def _status(run: FinishedRun, answer: Answer) -> str:
    loss = "KL" if run.result.get("fitness") == "kl" else "loss"
    if answer.status == "known":
        where = "the full cache" if answer.trial is None else f"trial {answer.trial}"
        return f"known, {loss} {answer.loss:.4g} ({where})"
    return f"predicted, {loss} {answer.loss:.4g} until it is scored"

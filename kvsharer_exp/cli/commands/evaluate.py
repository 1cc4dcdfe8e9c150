"""The command ``evaluate``: one plan or map, and the full cache, scored on the same items.

With ``engine=vllm`` the tasks are scored in vLLM too, and both runtimes are compared item by item.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.plan_words import kind_of, memory_words, unseen_lines
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import identify, tags_of, told_by_tasks
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.steps.engine_scores import EngineScores
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.measure.held_out import HeldOutScores
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.reporting.front_table import number, task_notes
from kvsharer_exp.values.score_names import retained, retained_metrics, share_name


def run(
    config: Config,
    log: RunLog,
    loaded: LoadedModel,
    windows: Windows,
    scorers: Scorers,
    plans: Plans,
) -> None:
    """Write ``result.json`` with the scores of plan and full cache, and what is retained."""
    plan = plans.plan
    scorers.load_tasks()
    plans.check()
    windows.require("fitness", "held_out")
    in_vllm = config.engine.name == "vllm"
    engine = EngineScores(config, log, loaded, scorers, plan) if in_vllm else None
    scorers.require(plan.actions)
    log.start(loaded.description, windows.texts, **tags_of(plan))
    loaded.tell_contexts()
    fitted, held_out = plans.fitted, scorers.held_out()
    plans.keep(fitted)
    seed = config.seed
    of_full = held_out.score(loaded.full_cache).behind(scorers.fitness.full_scores, seed=seed)
    full = of_full.scores
    log.say("scored the full cache")
    of_plan = held_out.score(fitted).behind(scorers.fitness.score(fitted), seed=seed)
    scores = of_plan.scores
    kept = retained(scores, full, scorers.directions, scorers.pass_marks)
    of_plan = of_plan.beside(of_full, kept, scorers.directions)
    size = footprint(loaded.model, plan, context=config.footprint.context)
    measured = measured_footprint(loaded.model, fitted, windows.held_out[:1])
    log.log_metrics(
        {
            **scores,
            **{f"full/{name}": value for name, value in full.items()},
            **retained_metrics(kept, of_plan.ends),
            "kv_fraction": size.kv_fraction,
            "kv_bytes_per_token": size.kv_bytes_per_token,
        }
    )
    kind = kind_of(plan)
    log.console.print(f"{kind} {plan}")
    sides = {"full": of_full, "shared" if kind == "map" else kind: of_plan}
    rows = _rows(sides, kept)
    log.console.print(TurningTable.of(rows))
    if any("(" in cell for _, *cells in rows for cell in cells):
        log.console.print("In brackets: 95% intervals over windows and items.")
    for note in task_notes([(scores, kept)], full, of_full.ends):
        log.console.print(note)
    log.console.print(memory_words(plan, size))
    tokens, prompt = config.heldout.window_tokens, config.scoring.prompt_tokens
    for line in unseen_lines(plan, "heldout.window_tokens", tokens, prompt):
        log.say(line)
    in_engine = {} if engine is None else {"engine": engine.score(fitted, of_plan)}
    log.finish(
        {
            **identify(plan),
            "scores": scores,
            "retained": kept,
            "intervals": of_plan.ends,
            "full": {"scores": full, "intervals": of_full.ends},
            "footprint": {**size.to_dict(), "measured": measured.to_dict()},
            **told_by_tasks(scorers.directions, scorers.pass_marks),
            **in_engine,
        },
        then=next_command(config, "sweep"),
    )


def _rows(sides: Mapping[str, HeldOutScores], kept: Mapping[str, float]) -> list[list[str]]:
    """Header and every score of the ``sides`` by name, the plan last.

    In brackets stand the intervals, and those of scores only if their ends read differently.
    """
    rows = [["score", *sides, "retained"]]
    *_, last = sides.values()
    for name in last.scores:
        cells = []
        for side in sides.values():
            inside = side.intervals.get(name)
            low, high = ("", "") if inside is None else (number(inside.low), number(inside.high))
            ends = f" ({low}–{high})" if low != high else ""
            cells.append(f"{number(side.scores[name], 4)}{ends}")
        inside = last.intervals.get(share_name(name))
        ends = "" if inside is None else f" ({inside.low:.1%}–{inside.high:.1%})"
        rows.append([name, *cells, f"{kept[name]:.1%}{ends}" if name in kept else ""])
    return rows

"""Collect what ``ablate`` measures, and publish it.

The command adds each walk to an `Ablation`. In the end `publish` prints the tables, writes the
figures and ``result.json``, and logs everything to MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.next_command import next_command, same_command
from kvsharer_exp.cli.session.result_file import told_by_tasks
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.steps.ablation_rows import RowScorer, Scores
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.reporting.ablation import Cell, Row, describe, summarise
from kvsharer_exp.reporting.ablation_fronts import (
    AREAS_LEGEND,
    Fronts,
    areas,
    areas_table,
    fronts,
    joint_sentences,
)
from kvsharer_exp.reporting.ablation_tables import (
    LEGEND,
    PLANS_LEGEND,
    acceptance_table,
    arms_table,
    limit_sentences,
    untested_sentences,
)
from kvsharer_exp.reporting.bench_table import ROWS_PER_CELL, cells_table, where_from
from kvsharer_exp.reporting.figures.ablation import (
    acceptance_rank_figure,
    arms_figure,
    fronts_figure,
    pairs_figure,
    threshold_figure,
)
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.reporting.front_table import task_notes
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.search.paper.acceptance import PairScore, RankBin, acceptance_by_rank
from kvsharer_exp.search.paper.arms import PLAN_ARMS, is_tested
from kvsharer_exp.values.correlation import spearman
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.ranking import DissimilarityRanking
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass
class Ablation:
    """Everything that an ablation measured.

    ``walks`` holds the longest trace of every walk with the test. Only the walks of the first
    variant count for acceptance against rank: ``ranking`` is that of the first variant, and
    ``tested`` holds, by arm, the result of each of these walks that tried most pairs. ``plans``
    holds for each of the ``rows`` what was scored.
    """

    scorer: RowScorer
    ranking: DissimilarityRanking
    rows: list[Row] = field(default_factory=list)
    plans: list[FittedPlan] = field(default_factory=list)
    walks: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[PairScore] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    tested: dict[str, list[GreedyResult]] = field(default_factory=dict)

    @property
    def timed_kind(self) -> str:
        """``map`` or ``plan``: what the first arm chose, which ``timings`` are of."""
        return "plan" if self.rows[0].arm in PLAN_ARMS else "map"

    def add(
        self,
        variant: Mapping[str, Any],
        arm: str,
        draw: int,
        found: Sequence[GreedyResult],
        plans: Sequence[FittedPlan] | None = None,
    ) -> None:
        """Score what one walk found, and keep the rows; without ``plans`` these are its maps."""
        if plans is None:
            plans = [FittedPlan.of(SharingMap(result.kv_source_layers)) for result in found]
        for result, plan in zip(found, plans, strict=True):
            self.rows.append(self.scorer.row(variant, arm, draw, result, plan))
            self.plans.append(plan)
        if not is_tested(arm):
            return
        longest = max(found, key=lambda result: result.candidates)
        trace = [step.to_dict() for step in longest.trace]
        self.walks.append({"variant": dict(variant), "arm": arm, "draw": draw, "trace": trace})
        if dict(variant) == self.rows[0].variant:
            self.tested.setdefault(arm, []).append(longest)


def publish(config: Config, log: RunLog, ablation: Ablation) -> None:
    """Print the tables of the whole ablation, keep its figures and files, and end the run."""
    full = ablation.scorer.full
    confidence = config.ablate.confidence
    directions = ablation.scorer.directions
    cells = summarise(ablation.rows, confidence=confidence, seed=config.seed, directions=directions)
    bins = {
        arm: acceptance_by_rank(
            ablation.ranking, [result.trace for result in results], confidence=confidence
        )
        for arm, results in ablation.tested.items()
    }
    tables = {"arms": arms_table(cells, full.scores, full.intervals)}
    drawn = fronts(cells)
    covered = areas(drawn)
    if covered:
        tables["areas"] = areas_table(covered)
    if bins:
        tables["acceptance"] = acceptance_table(bins)
    notes = [
        f"In brackets: {confidence:.0%} intervals. {LEGEND}",
        *too_few(ablation.rows, len(ablation.ranking.pairs), config.ablate.max_candidates),
        *limit_sentences(full.items, confidence=confidence),
        *untested_sentences(full.items),
        *notes_on_tasks(ablation.rows, full),
    ]
    if any(row.arm in PLAN_ARMS for row in ablation.rows):
        notes.insert(1, PLANS_LEGEND)
    if covered:
        notes[2:2] = [AREAS_LEGEND, *joint_sentences(covered)]
    correlations = _correlations(ablation.pairs, confidence)
    notes += [
        f"Spearman's ρ of a pair's distance and its {name} alone: {c['mean']:.2f} "
        f"({c['low']:.2f} to {c['high']:.2f}), {len(ablation.pairs)} pairs"
        for name, c in correlations.items()
    ]
    if ablation.timings:
        notes.append(where_from(ablation.timings[-1], ablation.timed_kind))
    _show(log, ablation, tables, notes)
    for name, content in _files(config, ablation, cells, drawn, bins, tables, notes).items():
        log.keep(name, content)
    first = next((row for row in ablation.rows if row.result.found), None)
    then = same_command(config, "search.threshold=0", without=["search.threshold"])
    if first is not None:
        sources = "_".join(map(str, first.result.kv_source_layers))
        named = f"plan={first.plan}" if first.plan else f"map={sources}"
        then = next_command(config, "evaluate", named)
    log.finish(
        {
            "experiment": config.ablate.name,
            "confidence": confidence,
            "max_candidates": config.ablate.max_candidates,
            "reference": {"variant": dict(cells[0].variant), "arm": cells[0].arm},
            "full": {
                "scores": full.scores,
                "intervals": {name: asdict(i) for name, i in full.intervals.items()},
            },
            "rows": [row.to_dict() for row in ablation.rows],
            "cells": [asdict(cell) for cell in cells],
            "areas": covered,
            "walks": ablation.walks,
            "acceptance": {arm: [asdict(b) for b in across] for arm, across in bins.items()},
            "pairs": [asdict(pair) for pair in ablation.pairs],
            "correlations": correlations,
            "timings": ablation.timings,
            "notes": notes,
            **told_by_tasks(directions, ablation.scorer.pass_marks),
        },
        then=then,
    )


def notes_on_tasks(rows: Sequence[Row], full: Scores) -> list[str]:
    """Say which tasks cannot tell the rows from the full cache, and which that one fails."""
    ends = {name: (inside.low, inside.high) for name, inside in full.intervals.items()}
    return task_notes([(row.scores, row.retained) for row in rows], full.scores, ends)


def too_few(rows: Sequence[Row], num_pairs: int, max_candidates: int | None) -> list[str]:
    """Say for each arm that found too few layers, in one sentence, at which ratios and why."""
    ratios: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in rows if row.result.found < row.result.requested):
        if row.arm in PLAN_ARMS:
            why = "no plan of that size"
        elif not row.result.trace:
            why = "no map of that size"
        elif row.result.candidates == max_candidates:
            why = f"the budget of {max_candidates} candidates was spent"
        else:
            why = f"all {num_pairs} pairs were tried or had a target already"
        ratio = f"{row.result.compression:.1%}"
        ratios.setdefault((describe(row.arm, row.variant), why), []).append(ratio)
    return [
        f"{words}: too few layers at {', '.join(dict.fromkeys(at))}; {why}"
        for (words, why), at in ratios.items()
    ]


def _correlations(pairs: Sequence[PairScore], confidence: float) -> dict[str, dict[str, float]]:
    distances = [pair.distance for pair in pairs]
    found = {
        name: spearman(distances, [getattr(pair, name) for pair in pairs], confidence=confidence)
        for name in ("cosine", "kl")
    }
    return {name: asdict(interval) for name, interval in found.items() if interval is not None}


def _show(
    log: RunLog,
    ablation: Ablation,
    tables: Mapping[str, Sequence[Sequence[str]]],
    notes: Sequence[str],
) -> None:
    for name, rows in tables.items():
        if name == "acceptance":
            log.console.print("accepted / tested, by rank of the pair (1: most dissimilar)")
        log.console.print(TurningTable.of(rows))
    if ablation.timings:
        kind = ablation.timed_kind
        log.console.print(f"the first arm's {kind}s (medians, lowest–highest), in order of ratio")
        timed = cells_table(ablation.timings, kind)
        log.console.print(TurningTable.of(timed, section=ROWS_PER_CELL))
    for note in notes:
        log.console.print(note, markup=False)


def _files(
    config: Config,
    ablation: Ablation,
    cells: Sequence[Cell],
    drawn: Fronts,
    bins: Mapping[str, Sequence[RankBin]],
    tables: Mapping[str, Sequence[Sequence[str]]],
    notes: Sequence[str],
) -> dict[str, bytes]:
    full_score = ablation.scorer.full.scores[HELD_OUT_PERPLEXITY]
    title = f"{config.model.name}: {config.ablate.name}"
    parts = [f"# {title}", *map(to_markdown, tables.values()), *notes]
    # Each line is one map, with the values that a paired test between two runs needs.
    items = [
        {"mlflow_run_id": row.mlflow_run_id, "items": dict(row.items)}
        for row in ablation.rows
        if row.items
    ]
    files = {
        "ablation.md": "\n\n".join(parts).encode() + b"\n",
        "items.jsonl": "".join(json.dumps(line) + "\n" for line in items).encode(),
        "arms.png": save_png(
            arms_figure(cells, HELD_OUT_PERPLEXITY, title=title, full_score=full_score)
        ),
    }
    if drawn:
        files["fronts.png"] = save_png(fronts_figure(drawn, title=title))
    if bins:
        files["acceptance.png"] = save_png(acceptance_rank_figure(bins, title=title))
    if ablation.pairs:
        threshold = config.search.threshold
        picture = pairs_figure(ablation.pairs, threshold=threshold, title=title)
        files["pairs.png"] = save_png(picture)
    points = curve(cells)
    if len(points) > 1:
        files["threshold.png"] = save_png(
            threshold_figure(points, HELD_OUT_PERPLEXITY, title=title, full_score=full_score)
        )
    return files


def curve(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    """By threshold, the cells of the first arm in which all else is as in the first variant."""
    points: dict[float, list[Cell]] = {}
    for cell in cells:
        rest = {key: value for key, value in cell.variant.items() if key != "search.threshold"}
        alike = all(cells[0].variant[key] == value for key, value in rest.items())
        if cell.arm == cells[0].arm and alike and "search.threshold" in cell.variant:
            points.setdefault(cell.variant["search.threshold"], []).append(cell)
    return points

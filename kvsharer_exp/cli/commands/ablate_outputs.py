"""What ``ablate`` leaves behind: tables on the terminal, figures, ``result.json``, MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvsharer_exp.cli.commands.ablate_scorer import Scorer
from kvsharer_exp.cli.commands.bench import cells_table, where_from
from kvsharer_exp.cli.commands.session import Session
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.reporting.ablation import PERPLEXITY, Cell, Row, describe, summarise
from kvsharer_exp.reporting.ablation_tables import (
    LEGEND,
    acceptance_table,
    arms_table,
    limit_sentences,
)
from kvsharer_exp.reporting.figures.ablation import (
    acceptance_rank_figure,
    arms_figure,
    pairs_figure,
    threshold_figure,
)
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.search.paper.acceptance import PairScore, RankBin, acceptance_by_rank
from kvsharer_exp.search.paper.arms import is_tested
from kvsharer_exp.values.correlation import spearman
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.ranking import DissimilarityRanking


@dataclass
class Outcome:
    """Everything measured. ``ranking``: of the first variant, whose walks count for acceptance
    against rank; ``walks``: the longest trace of every walk."""

    scorer: Scorer
    ranking: DissimilarityRanking
    rows: list[Row] = field(default_factory=list)
    walks: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[PairScore] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    tested: dict[str, list[GreedyResult]] = field(default_factory=dict)

    def add(
        self, variant: Mapping[str, Any], arm: str, draw: int, found: Sequence[GreedyResult]
    ) -> None:
        """The maps of one walk, scored."""
        self.rows += [self.scorer.row(variant, arm, draw, result) for result in found]
        if not is_tested(arm):
            return
        longest = max(found, key=lambda result: result.candidates)
        trace = [step.to_dict() for step in longest.trace]
        self.walks.append({"variant": dict(variant), "arm": arm, "draw": draw, "trace": trace})
        if dict(variant) == self.rows[0].variant:
            self.tested.setdefault(arm, []).append(longest)


def publish(session: Session, outcome: Outcome) -> None:
    """Tables, figures and files of the whole ablation; ends the run."""
    config, full = session.config, outcome.scorer.full
    confidence = config.ablate.confidence
    cells = summarise(outcome.rows, confidence=confidence, seed=config.seed)
    bins = {
        arm: acceptance_by_rank(
            outcome.ranking, [result.trace for result in results], confidence=confidence
        )
        for arm, results in outcome.tested.items()
    }
    tables = {"arms": arms_table(cells, full.scores, full.intervals)}
    if bins:
        tables["acceptance"] = acceptance_table(bins)
    notes = [
        f"In brackets: {confidence:.0%} intervals. {LEGEND}",
        *too_few(outcome.rows, len(outcome.ranking.pairs), config.ablate.max_candidates),
        *limit_sentences(full.items, confidence=confidence),
    ]
    correlations = _correlations(outcome.pairs, confidence)
    notes += [
        f"Spearman's ρ of a pair's distance and its {name} alone: {c['mean']:.2f} "
        f"({c['low']:.2f} to {c['high']:.2f}), {len(outcome.pairs)} pairs"
        for name, c in correlations.items()
    ]
    if outcome.timings:
        notes.append(where_from(outcome.timings[-1]))
    _show(session, outcome, tables, notes)
    _keep(session, _files(session, outcome, cells, bins, tables, notes))
    shared = [row.result.kv_source_layers for row in outcome.rows if row.result.found]
    best = "_".join(map(str, shared[0])) if shared else ""
    then = f"evaluate model={config.model.name} map={best}" if best else "ablate search.threshold=0"
    session.finish(
        {
            "experiment": config.ablate.name,
            "confidence": confidence,
            "max_candidates": config.ablate.max_candidates,
            "reference": {"variant": dict(cells[0].variant), "arm": cells[0].arm},
            "full": {
                "scores": full.scores,
                "intervals": {name: asdict(i) for name, i in full.intervals.items()},
            },
            "rows": [row.to_dict() for row in outcome.rows],
            "cells": [asdict(cell) for cell in cells],
            "walks": outcome.walks,
            "acceptance": {arm: [asdict(b) for b in across] for arm, across in bins.items()},
            "pairs": [asdict(pair) for pair in outcome.pairs],
            "correlations": correlations,
            "timings": outcome.timings,
            "notes": notes,
        },
        then=f"kvsharer {then}",
    )


def too_few(rows: Sequence[Row], num_pairs: int, max_candidates: int | None) -> list[str]:
    """One sentence for every arm that found fewer layers than asked for, and why it stopped."""
    ratios: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in rows if row.result.found < row.result.requested):
        if not row.result.trace:
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
    session: Session,
    outcome: Outcome,
    tables: Mapping[str, Sequence[Sequence[str]]],
    notes: Sequence[str],
) -> None:
    for name, (header, *rows) in tables.items():
        if name == "acceptance":
            session.console.print("accepted / tested, by rank of the pair (1: most dissimilar)")
        table = TurningTable(*header)
        for row in rows:
            table.add_row(*row)
        session.console.print(table)
    if outcome.timings:
        session.console.print("the first arm's maps (medians, lowest–highest), in order of ratio")
        session.console.print(cells_table(outcome.timings))
    for note in notes:
        session.console.print(note, markup=False)


def _files(
    session: Session,
    outcome: Outcome,
    cells: Sequence[Cell],
    bins: Mapping[str, Sequence[RankBin]],
    tables: Mapping[str, Sequence[Sequence[str]]],
    notes: Sequence[str],
) -> dict[str, bytes]:
    config, full = session.config, outcome.scorer.full.scores
    title = f"{config.model.name}: {config.ablate.name}"
    parts = [f"# {title}", *map(to_markdown, tables.values()), *notes]
    # One line a map: what a paired test between two runs needs.
    items = [
        {"mlflow_run_id": row.mlflow_run_id, "items": dict(row.items)}
        for row in outcome.rows
        if row.items
    ]
    files = {
        "ablation.md": "\n\n".join(parts).encode() + b"\n",
        "items.jsonl": "".join(json.dumps(line) + "\n" for line in items).encode(),
        "arms.png": save_png(
            arms_figure(cells, PERPLEXITY, title=title, full_score=full[PERPLEXITY])
        ),
    }
    if bins:
        files["acceptance.png"] = save_png(acceptance_rank_figure(bins, title=title))
    if outcome.pairs:
        threshold = config.search.threshold
        picture = pairs_figure(outcome.pairs, threshold=threshold, title=title)
        files["pairs.png"] = save_png(picture)
    points = curve(cells)
    if len(points) > 1:
        picture = threshold_figure(points, PERPLEXITY, title=title, full_score=full[PERPLEXITY])
        files["threshold.png"] = save_png(picture)
    return files


def curve(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    """Threshold → cells of the first arm, all else as in the first variant."""
    points: dict[float, list[Cell]] = {}
    for cell in cells:
        rest = {key: value for key, value in cell.variant.items() if key != "search.threshold"}
        alike = all(cells[0].variant[key] == value for key, value in rest.items())
        if cell.arm == cells[0].arm and alike and "search.threshold" in cell.variant:
            points.setdefault(cell.variant["search.threshold"], []).append(cell)
    return points


def _keep(session: Session, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (session.folder / name).write_bytes(content)
        session.tracker.log_bytes(session.run_id, content, name)

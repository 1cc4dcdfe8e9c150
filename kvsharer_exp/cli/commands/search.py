"""``search``: the paper's greedy strategy at each compression ratio → maps and the trace."""

from __future__ import annotations

from collections.abc import Sequence

from kvsharer_exp.cli.commands.calibrate import log_ranking
from kvsharer_exp.cli.commands.session import Session, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.reporting.figures.ranking import acceptance_figure
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.arms import Walker
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep


def run(config: Config) -> None:
    """Write ``result.json`` with, per ratio, the map and every pair tried in order."""
    with open_session(config) as session:
        for ratio in config.compression.ratios:
            num_targets(ratio, session.num_layers)  # refuse before the run exists
        start_run(session)
        log_ranking(session)
        found = walk(session, config.search.order, config.compression.ratios)
        _show(session, found)
        longest = max(found, key=lambda result: result.candidates)
        picture = save_png(acceptance_figure(longest, threshold=config.search.threshold))
        (session.folder / "acceptance.png").write_bytes(picture)
        session.tracker.log_bytes(session.run_id, picture, "acceptance.png")
        for result in found:
            session.tracker.log_metrics(
                session.run_id,
                {f"found/{result.compression:g}": result.found},
            )
        last = "_".join(map(str, found[-1].kv_source_layers))
        session.finish(
            {
                "order": config.search.order,
                "acceptance": config.search.acceptance,
                "threshold": config.search.threshold,
                "results": [result.to_dict() for result in found],
            },
            then=f"kvsharer evaluate model={config.model.name} map={last}",
        )


def walk(
    session: Session, order: str, ratios: Sequence[float], *, max_candidates: int | None = None
) -> list[GreedyResult]:
    """The greedy maps for ``ratios`` in this order of pairs, with progress."""
    settings = session.config.search

    def on_step(step: GreedyStep, count: int) -> None:
        if step.accepted:
            session.say(f"{order}: {step.target} reads {step.source}, {count} shared")

    walker = Walker(
        session.evaluator,
        session.ranking,
        threshold=settings.threshold,
        all_windows=settings.all_windows,
        max_candidates=max_candidates,
    )
    arm = f"{order}_{'tested' if settings.acceptance else 'untested'}"
    return walker.run(arm, ratios, seed=session.config.seed, on_step=on_step)


def _show(session: Session, found: Sequence[GreedyResult]) -> None:
    table = TurningTable(
        "compression", "shared", "tried", "accepted", "lowest cosine kept", "seconds"
    )
    for result in found:
        kept = [step.cosine for step in result.trace if step.accepted and step.cosine is not None]
        table.add_row(
            f"{result.compression:.1%}",
            f"{result.found}/{session.num_layers}",
            str(result.candidates),
            f"{result.found / result.candidates:.0%}" if result.candidates else "-",
            f"{min(kept):.3f}" if kept else "-",
            f"{result.seconds:.1f}",
        )
    session.console.print(table)
    for result in found:
        if result.found < result.requested:
            session.console.print(
                f"[bold]{result.compression:.1%}: only {result.found} of the {result.requested} "
                f"layers asked for were found; all {result.candidates} pairs were tried at "
                f"T = {session.config.search.threshold:g}[/]"
            )
    for result in found:
        text = "_".join(map(str, result.kv_source_layers))
        session.console.print(f"{result.compression:.1%}  {text}")

"""The command ``search``: the map that the paper's greedy strategy finds at each ratio."""

from __future__ import annotations

from collections.abc import Sequence

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.reporting.figures.ranking import acceptance_figure
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.values.greedy import GreedyResult


def run(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, calibration: Calibration
) -> None:
    """Write ``result.json`` with the map of each ratio and every pair tried, in order."""
    ratios, threshold = config.compression.ratios, config.search.threshold
    for ratio in ratios:
        num_targets(ratio, loaded.num_layers)  # refuses a ratio before the run exists
    windows.require("calibration")
    log.start(loaded.description, windows.texts)
    calibration.keep_ranking(log)
    found = calibration.walk(log, config.search.order, ratios)
    _show(log, found, loaded.num_layers, threshold)
    longest = max(found, key=lambda result: result.candidates)
    log.keep("acceptance.png", save_png(acceptance_figure(longest, threshold=threshold)))
    for result in found:
        log.log_metrics({f"found/{result.compression:g}": result.found})
    last = "_".join(map(str, found[-1].kv_source_layers))
    log.finish(
        {
            "order": config.search.order,
            "acceptance": config.search.acceptance,
            "threshold": threshold,
            "results": [result.to_dict() for result in found],
        },
        then=next_command(config, "evaluate", f"map={last}"),
    )


def _show(log: RunLog, found: Sequence[GreedyResult], num_layers: int, threshold: float) -> None:
    table = TurningTable(
        "compression", "shared", "tried", "accepted", "lowest cosine kept", "seconds"
    )
    for result in found:
        kept = [step.cosine for step in result.trace if step.accepted and step.cosine is not None]
        table.add_row(
            f"{result.compression:.1%}",
            f"{result.found}/{num_layers}",
            str(result.candidates),
            f"{result.found / result.candidates:.0%}" if result.candidates else "-",
            f"{min(kept):.3f}" if kept else "-",
            f"{result.seconds:.1f}",
        )
    log.console.print(table)
    for result in found:
        if result.found < result.requested:
            log.console.print(
                f"[bold]{result.compression:.1%}: only {result.found} of the {result.requested} "
                f"layers asked for were found; all {result.candidates} pairs were tried at "
                f"T = {threshold:g}[/]"
            )
    for result in found:
        text = "_".join(map(str, result.kv_source_layers))
        log.console.print(f"{result.compression:.1%}  {text}")

"""The command ``calibrate``: the distances between layers, as a matrix, ranking and heat map."""

from __future__ import annotations

import math

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.terminal import TurningTable

SHOWN = 5  # pairs that are printed from either end of the ranking


def run(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, calibration: Calibration
) -> None:
    """Write ``ranking.json``, ``distances.png`` and ``result.json``."""
    windows.require("calibration")
    log.start(loaded.description, windows.texts)
    calibration.keep_ranking(log)
    wanted, pairs = config.calibration, calibration.ranking.pairs
    table = TurningTable("rank", "target reads source", wanted.distance)
    rows = list(enumerate(pairs, 1))
    for number, pair in rows[:SHOWN] + rows[max(SHOWN, len(rows) - SHOWN) :]:
        table.add_row(str(number), f"{pair.target} ← {pair.source}", f"{pair.distance:.4g}")
    log.console.print(table)
    matrix = [[None if math.isnan(d) else d for d in row] for row in calibration.distances]
    log.finish(
        {
            "distance": wanted.distance,
            "states": wanted.states,
            "num_windows": wanted.num_windows,
            "window_tokens": wanted.window_tokens,
            "distances": matrix,
            "ranking": [pair.to_dict() for pair in pairs],
        },
        then=next_command(config, "search"),
    )

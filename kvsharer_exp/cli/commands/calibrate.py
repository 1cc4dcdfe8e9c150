"""``calibrate``: layer statistics → distance matrix, ranking, heat map."""

from __future__ import annotations

import math

from kvsharer_exp.cli.commands.session import Session, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.reporting.figures.ranking import distance_heatmap
from kvsharer_exp.reporting.figures.style import save_png

SHOWN = 5


def run(config: Config) -> None:
    """Write ``ranking.json``, ``distances.png`` and ``result.json``."""
    with open_session(config) as session:
        start_run(session)
        log_ranking(session)
        pairs = session.ranking.pairs
        table = TurningTable("rank", "target reads source", config.calibration.distance)
        rows = list(enumerate(pairs, 1))
        shown = rows[:SHOWN] + rows[max(SHOWN, len(rows) - SHOWN) :]
        for number, pair in shown:
            table.add_row(str(number), f"{pair.target} ← {pair.source}", f"{pair.distance:.4g}")
        session.console.print(table)
        matrix = [[None if math.isnan(d) else d for d in row] for row in session.distances]
        session.finish(
            {
                "distance": config.calibration.distance,
                "states": config.calibration.states,
                "num_windows": config.calibration.num_windows,
                "window_tokens": config.calibration.window_tokens,
                "distances": matrix,
                "ranking": [pair.to_dict() for pair in pairs],
            },
            then=f"kvsharer search model={config.model.name}",
        )


def log_ranking(session: Session) -> None:
    """The ranking and its heat map, in the run folder and in MLflow."""
    distance = session.config.calibration.distance
    session.say(f"ranked {len(session.ranking.pairs)} pairs of layers by {distance}")
    title = f"{session.config.model.name}: {distance} between layers' mean KV"
    picture = save_png(distance_heatmap(session.distances, title))
    ranking = session.ranking.to_json()
    (session.folder / "ranking.json").write_text(ranking + "\n", encoding="utf-8")
    (session.folder / "distances.png").write_bytes(picture)
    session.tracker.log_text(session.run_id, ranking, "ranking.json")
    session.tracker.log_bytes(session.run_id, picture, "distances.png")

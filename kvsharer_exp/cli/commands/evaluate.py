"""The command ``evaluate``: the scores of one map and of the full cache, on the same items."""

from __future__ import annotations

from collections.abc import Mapping

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.named_maps import read_map
from kvsharer_exp.cli.session.result_file import identify, told_directions
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.values.score_names import retained


def run(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, scorers: Scorers
) -> None:
    """Write ``result.json`` with the scores of the map and the full cache, and what is retained."""
    sharing_map = read_map(config, log.tracker)
    scorers.load_tasks()
    loaded.check(sharing_map)
    windows.require("held_out")
    scorers.require()
    log.start(
        loaded.description,
        windows.texts,
        kv_source_layers=str(sharing_map),
        digest=sharing_map.digest,
    )
    held_out = scorers.held_out()
    full = {**scorers.fitness.full_scores.named(), **held_out.score(loaded.full_cache).scores}
    log.say("scored the full cache")
    scores = {**scorers.fitness.score(sharing_map).named(), **held_out.score(sharing_map).scores}
    kept = retained(scores, full, scorers.directions)
    size = footprint(loaded.model, sharing_map)
    measured = measured_footprint(loaded.model, sharing_map, windows.held_out[:1])
    log.log_metrics(
        {
            **scores,
            **{f"full/{name}": value for name, value in full.items()},
            **{f"retained/{name}": value for name, value in kept.items()},
            "kv_fraction": size.kv_fraction,
            "kv_bytes_per_token": size.kv_bytes_per_token,
        }
    )
    log.console.print(f"map {sharing_map}")
    log.console.print(_table(scores, full, kept))
    log.console.print(
        f"{len(sharing_map.targets)} of {sharing_map.num_layers} layers shared: "
        f"{size.kv_bytes_per_token:,} KV bytes per token ({size.kv_fraction:.1%} of full), "
        f"{size.parameter_bytes_saved:,} bytes of K/V projections unused"
    )
    log.finish(
        {
            **identify(sharing_map),
            "scores": scores,
            "retained": kept,
            "full": {"scores": full},
            "footprint": {**size.to_dict(), "measured": measured.to_dict()},
            **told_directions(scorers.directions),
        },
        then=f"kvsharer sweep model={loaded.name}",
    )


def _table(
    scores: Mapping[str, float], full: Mapping[str, float], kept: Mapping[str, float]
) -> TurningTable:
    table = TurningTable("score", "full", "shared", "retained")
    for name, value in scores.items():
        share = f"{kept[name]:.1%}" if name in kept else ""
        table.add_row(name, f"{full[name]:.4g}", f"{value:.4g}", share)
    return table

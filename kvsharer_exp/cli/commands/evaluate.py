"""``evaluate``: scores of one map beside the full cache, on the same items."""

from __future__ import annotations

import re

from kvsharer_exp.cli.commands.session import Session, fit_scores, identify, open_session, start_run
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.terminal import TurningTable
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.model.sharing.architectures import attention_layers, check_map
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.score_names import retained
from kvsharer_exp.values.sharing_map import SharingMap


def run(config: Config) -> None:
    """Write ``result.json`` with the map's scores, the full cache's, and what is retained."""
    with open_session(config) as session:
        sharing_map = read_map(config, session.tracker)
        _ = session.tasks  # named wrongly or out of reach: say so before model time
        check_map(sharing_map, attention_layers(session.model))
        start_run(session, kv_source_layers=str(sharing_map), digest=sharing_map.digest)
        identity = SharingMap.identity(sharing_map.num_layers)
        full = fit_scores(session.scoring_evaluator.full_scores) | session.report_scores(identity)
        session.say("scored the full cache")
        scores = fit_scores(session.scoring_evaluator.score(sharing_map))
        scores |= session.report_scores(sharing_map)
        kept = retained(scores, full)
        size = footprint(session.model, sharing_map)
        measured = measured_footprint(session.model, sharing_map, session.report_windows[:1])
        session.tracker.log_metrics(
            session.run_id,
            {
                **scores,
                **{f"full/{name}": value for name, value in full.items()},
                **{f"retained/{name}": value for name, value in kept.items()},
                "kv_fraction": size.kv_fraction,
                "kv_bytes_per_token": size.kv_bytes_per_token,
            },
        )
        _show(session, sharing_map, scores, full, kept)
        session.console.print(
            f"{len(sharing_map.targets)} of {sharing_map.num_layers} layers shared: "
            f"{size.kv_bytes_per_token:,} KV bytes per token ({size.kv_fraction:.1%} of full), "
            f"{size.parameter_bytes_saved:,} bytes of K/V projections unused"
        )
        session.finish(
            {
                **identify(sharing_map),
                "scores": scores,
                "retained": kept,
                "full": {"scores": full},
                "footprint": {**size.to_dict(), "measured": measured.to_dict()},
            },
            then=f"kvsharer sweep model={config.model.name}",
        )


def read_map(config: Config, tracker: Tracker) -> SharingMap:
    """``map=``: text, a list, a path to a .json, or the id of an MLflow run that has a map.

    Raises:
        InputError: none given, or none of these.
    """
    value = config.map
    if value is None:
        raise InputError("no map given: map=0_1_0_3, map=path.json or map=<MLflow run id>")
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value):
        return tracker.find_map(value)
    return SharingMap.parse(str(value) if isinstance(value, int) else value)


def _show(
    session: Session,
    sharing_map: SharingMap,
    scores: dict[str, float],
    full: dict[str, float],
    kept: dict[str, float],
) -> None:
    table = TurningTable("score", "full", "shared", "retained")
    for name, value in scores.items():
        share = f"{kept[name]:.1%}" if name in kept else ""
        table.add_row(name, f"{full[name]:.4g}", f"{value:.4g}", share)
    session.console.print(f"map {sharing_map}")
    session.console.print(table)

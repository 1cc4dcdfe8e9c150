"""The command ``export``: one map as a model folder, with a card on what it saves and costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.named_maps import read_map
from kvsharer_exp.cli.session.result_file import identify
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.reporting.model_card import Measured, model_card
from kvsharer_exp.shipping.export import check_destination, check_model, write_export
from kvsharer_exp.values.score_names import retained


def run(
    config: Config, log: RunLog, loaded: LoadedModel, windows: Windows, scorers: Scorers
) -> None:
    """Write the model folder and ``result.json``."""
    sharing_map = read_map(config, log.tracker)
    wanted = config.export
    path = Path(wanted.path) if wanted.path else log.folder / "export"
    check_destination(path, overwrite=wanted.overwrite)
    loaded.check(sharing_map)
    check_model(loaded.model)
    windows.require("calibration", "held_out")
    log.start(
        loaded.description,
        windows.texts,
        kv_source_layers=str(sharing_map),
        digest=sharing_map.digest,
    )
    held_out = scorers.held_out(tasks=False)
    full = {**scorers.fitness.full_scores.named(), **held_out.score(loaded.full_cache).scores}
    scores = {**scorers.fitness.score(sharing_map).named(), **held_out.score(sharing_map).scores}
    kept = retained(scores, full)
    log.say("scored full and shared")
    size = replace(
        footprint(loaded.model, sharing_map),
        measured=measured_footprint(loaded.model, sharing_map, windows.held_out[:1]),
    )
    card = model_card(
        loaded.spec,
        loaded.description,
        sharing_map,
        Measured(
            size=size,
            scores=scores,
            full=full,
            calibration=(config.calibration.path, *windows.calibration.shape),
            held_out=(config.heldout.path, *windows.held_out.shape),
            device=str(loaded.model.device),
            seed=config.seed,
            versions=log.environment,
        ),
    )
    weight_bytes = write_export(
        loaded.model, loaded.tokenizer, sharing_map, path, card=card, overwrite=wanted.overwrite
    )
    log.tracker.log_text(log.run_id, card, "model_card.md")
    log.log_metrics(
        {
            **scores,
            **{f"full/{name}": value for name, value in full.items()},
            "kv_fraction": size.kv_fraction,
            "weight_file_bytes": weight_bytes,
            "parameter_bytes_saved": size.parameter_bytes_saved,
        }
    )
    log.console.print(
        f"{len(sharing_map.targets)} of {sharing_map.num_layers} layers shared: "
        f"{size.kv_bytes_per_token:,} KV bytes per token ({size.kv_fraction:.1%} of full), "
        f"{size.parameter_bytes_saved:,} bytes of weights left out, {weight_bytes:,} written"
    )
    log.console.print(f"export   {path}", markup=False)
    log.finish(
        {
            **identify(sharing_map),
            "scores": scores,
            "retained": kept,
            "full": {"scores": full},
            "footprint": size.to_dict(),
            "export": {"path": str(path), "weight_file_bytes": weight_bytes},
        },
        then=f"kvsharer generate model={loaded.name} map={path / 'sharing_map.json'} "
        'generate.prompt="…"',
    )

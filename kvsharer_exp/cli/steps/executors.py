"""Make the executor that the group ``executor`` asks for.

The command ``sweep`` searches inside `open_executor`; the workers end with the block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.steps.sweep_worker import MAKE, settings_of
from kvsharer_exp.search.execution.base import Executor
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.execution.processes import ProcessCrew
from kvsharer_exp.search.stages import StagedScorer
from kvsharer_exp.values.errors import InputError

_ON_A_CPU = 2  # workers, unless their number is given
_BESIDE_MODEL = 1 << 30  # bytes of a worker beside its model: torch itself, and a batch of logits


@contextmanager
def open_executor(
    config: Config,
    log: RunLog,
    scorer: StagedScorer,
    identity: dict[str, Any],
) -> Iterator[Executor]:
    """Start the workers, if any. ``scorer`` scores in this process.

    Raises:
        InputError: there is no Ray cluster, or it is too small.
    """
    wanted = config.executor
    if wanted.name == "local":
        together = config.scoring.maps_per_forward
        yield LocalExecutor(scorer, together=together, look_ahead=scorer.look_ahead)
        return
    settings = settings_of(config, identity)
    if wanted.name == "processes":
        count = _num_processes(config)
        folder = log.folder / "workers"
        crew = ProcessCrew(MAKE, settings, folder=folder, environments=_environments(count))
        log.say(f"{count} worker processes, which log to {folder}")
        with Pool(crew, count, trial_timeout=wanted.trial_timeout, say=log.say) as pool:
            yield pool
        return
    from kvsharer_exp.search.execution.ray_cluster import RayCrew, cluster

    with cluster(wanted.address) as resources:
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
        num_gpus = wanted.num_gpus if wanted.num_gpus is not None else float(gpus > 0)
        fitting = min(gpus / num_gpus if num_gpus else math.inf, cpus / wanted.num_cpus)
        if fitting < 1:
            raise InputError(
                f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs, too few for one worker: "
                "lower executor.num_cpus or executor.num_gpus"
            )
        count = wanted.num_workers or int(fitting)
        ray_crew = RayCrew(MAKE, settings, num_cpus=wanted.num_cpus, num_gpus=num_gpus)
        log.say(f"{count} Ray workers of {wanted.num_cpus:g} CPUs and {num_gpus:g} GPUs each")
        with Pool(ray_crew, count, trial_timeout=wanted.trial_timeout, say=log.say) as pool:
            yield pool


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else map(str, range(torch.cuda.device_count()))
    return list(names)


def _environments(count: int) -> list[dict[str, str]]:
    """What each of ``count`` workers finds in its environment: its GPU, or its share of threads."""
    gpus = _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    threads = max(1, torch.get_num_threads() // count)
    return [{"OMP_NUM_THREADS": str(threads)}]


def _num_processes(config: Config) -> int:
    return config.executor.num_workers or len(_gpus()) or _ON_A_CPU


def require_memory(config: Config, loaded: LoadedModel) -> None:
    """Refuse more worker processes than there is memory for, where each holds the model.

    Raises:
        InputError: names the number that fits.
    """
    if config.executor.name != "processes":
        return
    count = _num_processes(config)
    model = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    gpus = _gpus()
    if gpus:
        free = [torch.cuda.mem_get_info(index)[0] for index in range(len(gpus))]
        fitting = sum(int(bytes_ // (model + _BESIDE_MODEL)) for bytes_ in free)
    else:
        fitting = int(psutil.virtual_memory().available // (model + _BESIDE_MODEL))
    if count > fitting:
        raise InputError(
            f"executor.num_workers={count}: each needs {(model + _BESIDE_MODEL) / 2**30:.1f} GiB, "
            f"and there is memory for {fitting}: give at most {max(1, fitting)}, or use a smaller "
            "model.dtype"
        )

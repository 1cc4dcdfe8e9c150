"""Make the executor that the group ``executor`` asks for.

The command ``sweep`` searches inside `open_executor`; the workers end with the block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch

from kvsharer_exp.cli.config.executor import LOADING_SECONDS
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.steps.sweep_worker import MAKE, settings_of
from kvsharer_exp.measure.fits import Fits
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
    loaded: LoadedModel,
    scorer: StagedScorer,
    identity: dict[str, Any],
    fitted: Fits,
) -> Iterator[Executor]:
    """Start the workers, if any. ``scorer`` scores in this process, with the fits ``fitted``.

    Raises:
        InputError: there is no Ray cluster, or it is too small.
    """
    wanted = config.executor
    if wanted.name == "local":
        together = config.scoring.maps_per_forward
        yield LocalExecutor(scorer, together=together, look_ahead=scorer.look_ahead)
        return
    settings = settings_of(config, identity, fitted)
    if wanted.name == "processes":
        count = _num_processes(config)
        folder = log.folder / "workers"
        crew = ProcessCrew(MAKE, settings, folder=folder, environments=_environments(count))
        log.say(f"{count} worker processes, which log to {folder}")
        limit = wanted.trial_timeout
        loading = None if limit is None else max(limit, LOADING_SECONDS)
        with Pool(crew, count, trial_timeout=limit, start_timeout=loading, say=log.say) as pool:
            yield pool
        return
    from kvsharer_exp.search.execution.ray_cluster import (
        RayCrew,
        cluster,
        fitting,
        in_memory,
        living_nodes,
    )

    with cluster(wanted.address) as nodes:
        has_gpus = any(node.get("GPU") for node in nodes)
        num_gpus = wanted.num_gpus if wanted.num_gpus is not None else float(has_gpus)
        room = partial(fitting, num_cpus=wanted.num_cpus, num_gpus=num_gpus)
        if not room(nodes):
            raise InputError(
                f"no node of the Ray cluster ({len(nodes)} in all) has {wanted.num_cpus:g} CPUs "
                f"and {num_gpus:g} GPUs, one worker's: lower executor.num_cpus or executor.num_gpus"
            )
        # A worker that has GPUs keeps its model there, and Ray knows nothing of their memory.
        memory = _BESIDE_MODEL + (0 if num_gpus else _model_bytes(loaded))
        fits = room(nodes, memory=memory)
        count = wanted.num_workers or max(1, fits)
        _refuse_beyond(in_memory(nodes, memory) if fits else 0, count, memory)
        ray_crew = RayCrew(
            MAKE, settings, num_cpus=wanted.num_cpus, num_gpus=num_gpus, memory=memory
        )
        log.say(f"{count} Ray workers of {wanted.num_cpus:g} CPUs and {num_gpus:g} GPUs each")
        may_have = None if wanted.num_workers else lambda: room(living_nodes(), memory=memory)
        limit = wanted.trial_timeout
        with Pool(ray_crew, count, may_have=may_have, trial_timeout=limit, say=log.say) as pool:
            yield pool


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else map(str, range(torch.cuda.device_count()))
    return list(names)


def _environments(count: int) -> list[dict[str, str]]:
    """What each of ``count`` workers finds in its environment: its GPU, or its share of threads.

    The GPUs take turns. The first one comes last, for this process has its own model there.
    """
    gpus = _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in reversed(gpus)]
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
    need, gpus = _model_bytes(loaded) + _BESIDE_MODEL, _gpus()
    free = [torch.cuda.mem_get_info(index)[0] for index in reversed(range(len(gpus)))]
    free = free or [psutil.virtual_memory().available]
    # The devices take turns, and the first that would have one too many ends the round.
    fits = min(turn + len(free) * int(bytes_ // need) for turn, bytes_ in enumerate(free))
    _refuse_beyond(fits, _num_processes(config), need)


def _model_bytes(loaded: LoadedModel) -> int:
    return sum(p.numel() * p.element_size() for p in loaded.model.parameters())


def _refuse_beyond(fits: int, count: int, need: int) -> None:
    """Refuse ``count`` workers of ``need`` bytes each, where only ``fits`` have room."""
    if count > fits:
        way = f"give at most {fits}" if fits else "leave executor out"
        raise InputError(
            f"executor.num_workers={count}: each needs {need / 2**30:.1f} GiB, and there is memory "
            f"for {fits}: {way}, or use a smaller model.dtype"
        )

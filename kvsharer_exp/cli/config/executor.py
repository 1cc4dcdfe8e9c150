"""The group ``executor``: who scores the plans of a sweep. `Config` holds it."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.cli.config.texts import one_of
from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class ExecutorConfig:
    """Who scores the plans of a sweep: this process, or workers that it starts.

    Args:
        name: ``local``, ``processes`` or ``ray``; ``executor=processes`` sets it. Default:
            ``local``.
        num_workers: the number of workers, at least 1. Default: one for each GPU. Without a GPU
            two, and on a Ray cluster as many as its CPUs allow.
        address: with ``ray``: where the cluster listens, like ``10.0.0.1:6379``. Default: the
            cluster of ``RAY_ADDRESS``; without that Ray starts one on this machine.
        num_gpus: with ``ray``: the GPUs of each worker, at least 0; a fraction is a share of one.
            Give several with ``model.device_map=auto`` for a model that is too large for one.
            Default: 1 where the cluster has GPUs, else 0.
        num_cpus: with ``ray``: the CPUs of each worker, above 0. Default: 1.
        trial_timeout: the seconds that a plan may take before its worker is replaced, above 0.
            Default: no limit.
    """

    name: str = "local"
    num_workers: int | None = None
    address: str | None = None
    num_gpus: float | None = None
    num_cpus: float = 1.0
    trial_timeout: float | None = None

    def __post_init__(self) -> None:
        one_of("executor", self.name, ("local", "processes", "ray"))
        if self.num_workers is not None:
            at_least("executor.num_workers", self.num_workers, 1)
        if self.num_gpus is not None and self.num_gpus < 0:
            raise InputError(f"executor.num_gpus={self.num_gpus:g}: give at least 0")
        if self.num_cpus <= 0:
            raise InputError(f"executor.num_cpus={self.num_cpus:g}: give CPUs above 0")
        if self.trial_timeout is not None and self.trial_timeout <= 0:
            raise InputError(f"executor.trial_timeout={self.trial_timeout:g}: give seconds above 0")
        if self.name == "local":
            for key in ("num_workers", "trial_timeout"):
                if getattr(self, key) is not None:
                    raise InputError(
                        f"executor.{key} is for workers: give executor=processes or executor=ray "
                        "with it"
                    )
        if self.name != "ray" and (self.address or self.num_gpus is not None):
            key = "address" if self.address else "num_gpus"
            raise InputError(f"executor.{key} is for a Ray cluster: give executor=ray with it")

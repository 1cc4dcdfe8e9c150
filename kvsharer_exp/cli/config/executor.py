"""The group ``executor``: who scores the plans of a sweep. `Config` holds it."""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.cli.config.texts import one_of
from kvsharer_exp.values.errors import InputError, at_least

LOADING_SECONDS = 3600.0  # at least so many has a worker process, where there is a trial_timeout
_LEAST_SHARE = 1e-4  # of a CPU or a GPU: Ray counts in these
_YEAR = 365 * 24 * 3600.0


@dataclass
class ExecutorConfig:
    """Who scores the plans of a sweep: this process, or workers that it starts.

    Args:
        name: ``local``, ``processes`` or ``ray``; ``executor=processes`` sets it. Default:
            ``local``.
        num_workers: the number of workers, at least 1. Default: one for each GPU. Without a GPU
            two, and on a Ray cluster as many as its CPUs and memory allow, also when it grows.
        address: with ``ray``: where the cluster listens, like ``10.0.0.1:6379``. Default: the
            cluster of ``RAY_ADDRESS``; without that Ray starts one on this machine.
        num_gpus: with ``ray``: the GPUs of each worker, at least 0; below 1 it is a share of one.
            Give several with ``model.device_map=auto`` for a model that is too large for one.
            Default: 1 where the cluster has GPUs, else 0.
        num_cpus: with ``ray``: the CPUs of each worker, at least 0.0001. Default: 1.
        trial_timeout: the seconds that a plan may take before its worker is replaced, above 0. With
            it a worker process may take as long to load, or an hour if that is longer. Default: no
            limit.
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
        self._check_shares()
        if self.trial_timeout is not None and not 0 < self.trial_timeout <= _YEAR:
            raise InputError(
                f"executor.trial_timeout={self.trial_timeout:g}: give seconds above 0, and at most "
                f"{_YEAR:g}, a year"
            )
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

    def _check_shares(self) -> None:
        """Refuse what Ray cannot count.

        Raises:
            InputError: names the key and the value.
        """
        if self.num_gpus is not None:
            counts = self.num_gpus == 0 or self.num_gpus >= _LEAST_SHARE
            if not counts or (self.num_gpus > 1 and self.num_gpus % 1):
                raise InputError(
                    f"executor.num_gpus={self.num_gpus:g}: give 0, a share of at least "
                    f"{_LEAST_SHARE:g}, or a whole number"
                )
        if self.num_cpus < _LEAST_SHARE:
            raise InputError(
                f"executor.num_cpus={self.num_cpus:g}: give CPUs above 0, at least {_LEAST_SHARE:g}"
            )

"""Workers that are actors of a Ray cluster, on any of its nodes.

An actor is never restarted by Ray: the `Pool` counts losses and starts new ones. An actor for which
there is no room waits until the cluster has room. A node that joins takes such actors, or else the
`Pool` is told that there is room for more.

https://docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvsharer_exp.search.execution.base import Done, Task, attempt
from kvsharer_exp.search.execution.pool import Lost, News, Ready
from kvsharer_exp.search.execution.worker import make_score
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

# Without it Ray uses the loopback interface only. That is the default on Windows and macOS, and the
# variable works anywhere: https://github.com/ray-project/ray/issues/18730
_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class RayWorker:
    """What the actor of a worker does; it is given text and gives text."""

    def ready(self, make: str, settings: str) -> str:
        """Make the scorer; returns why it refuses to, or nothing."""
        try:
            self._score = make_score(make, settings)
        except InputError as error:
            return str(error)
        return ""

    def score(self, task: str) -> str:
        """Score the plan of a `Task`; returns the `Done`."""
        return attempt(self._score, Task.from_json(task)).to_json()


class RayCrew:
    """Starts actors that score plans (`pool.Crew`).

    Args:
        make: the function that makes the scorer, as ``package.module:function``.
        settings: the text that it is called with.
        num_cpus: the CPUs of each worker.
        num_gpus: the GPUs of each worker.
        memory: the bytes of its node's memory that each worker may need; 0: any.
    """

    def __init__(
        self, make: str, settings: str, *, num_cpus: float, num_gpus: float, memory: int = 0
    ) -> None:
        import ray

        self._ray = ray
        self._make, self._settings = make, settings
        self._kind = ray.remote(RayWorker).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            memory=memory,
            max_restarts=0,
            max_task_retries=0,
        )
        self._asked: dict[Any, Any] = {}  # what was asked → the actor that was asked

    def start(self, number: int) -> Any:
        actor: Any = self._kind.remote()
        self._asked[actor.ready.remote(self._make, self._settings)] = actor
        return actor

    def send(self, worker: Any, task: Task) -> None:
        self._asked[worker.score.remote(task.to_json())] = worker

    def stop(self, worker: Any) -> None:
        self._asked = {asked: actor for asked, actor in self._asked.items() if actor is not worker}
        self._ray.kill(worker)

    def news(self, seconds: float | None) -> list[tuple[Any, News]]:
        ready, _ = self._ray.wait(list(self._asked), timeout=seconds)
        return [(self._asked.pop(asked), self._answer(asked)) for asked in ready]

    def _answer(self, asked: Any) -> News:
        try:
            said = self._ray.get(asked)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Lost(lines[-1].strip()[:200])
        if not said:
            return Ready()
        return Done.from_json(said) if said.startswith("{") else Lost(said, InputError(said))


@contextmanager
def cluster(address: str | None) -> Iterator[list[dict[str, float]]]:
    """Connect to the cluster at ``address``, or start one here; gives each node's resources.

    Without an address the one of the variable ``RAY_ADDRESS`` counts. A cluster that is started
    here listens on the loopback interface only, if ``ray`` was not imported before.

    Raises:
        InputError: Ray is not installed, no cluster listens there, or Ray fails; then it says why.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    if where == "local":
        os.environ.setdefault(_SEVERAL_MACHINES, "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "executor=ray needs Ray, which is not installed: pip install 'kvsharer_exp[ray]'"
        ) from error
    if where not in ("local", "auto"):
        _check_listens(where)
    # Without GPUs of their own, actors may see those of the machine, as this process does.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own: dict[str, Any] = {"include_dashboard": False} if where == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # of many types: where a start takes too long, it has no other
        raise _failure(where, error) from error
    finally:
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in its place
    try:
        yield living_nodes()
    finally:
        ray.shutdown()


def living_nodes() -> list[dict[str, float]]:
    """The resources of each node that the cluster has now, inside `cluster`."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitting(
    nodes: Sequence[Mapping[str, float]], *, num_cpus: float, num_gpus: float, memory: int = 0
) -> int:
    """How many workers of so many CPUs, GPUs and bytes fit on ``nodes``, each within one of them.

    A share of a GPU is one of a single GPU. Ray counts in units of 1/10000.
    """
    cpu, gpu = round(1e4 * num_cpus), round(1e4 * num_gpus)

    def fit(node: Mapping[str, float]) -> int:
        room, gpus = round(1e4 * node.get("CPU", 0.0)) // cpu, int(node.get("GPU", 0.0))
        if gpu:
            most = gpus * (10_000 // gpu) if gpu < 10_000 else 10_000 * gpus // gpu
            room = min(room, most)
        return min(room, in_memory([node], memory))

    return sum(map(fit, nodes))


def in_memory(nodes: Sequence[Mapping[str, float]], memory: int) -> int:
    """How many workers of so many bytes fit on ``nodes``, whatever else they need."""
    return sum(int(node.get("memory", 0.0) // memory) for node in nodes) if memory else sys.maxsize


def _check_listens(where: str) -> None:
    host, _, port = where.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise _unreachable(where) from error


def _failure(where: str, error: Exception) -> InputError:
    """What to say of an ``error`` of ``ray.init``: here, or where somebody listens."""
    said = clip((str(error).strip() or type(error).__name__).partition("\n")[0], 70)
    if where == "local":
        return InputError(f"Ray does not start here ({said}): try again, or use another executor")
    if where == "auto" and isinstance(error, ConnectionError):
        return _unreachable(where)
    return InputError(
        f"the Ray cluster at executor.address={where} refuses ({said}): check that Ray and Python "
        "are of one version"
    )


def _unreachable(where: str) -> InputError:
    return InputError(
        f"no Ray cluster listens at executor.address={where}: start one with ray start --head, "
        "or leave executor.address out"
    )

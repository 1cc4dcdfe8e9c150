"""Executors on a Ray cluster of two nodes, both on this machine, of which one goes away."""

import json
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.execution.ray_cluster import (
    RayCrew,
    cluster,
    fitting,
    in_memory,
    living_nodes,
)
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
from tests.refusals import check_refusal
from tests.search import cheap


@pytest.mark.slow
def test_a_node_that_goes_away_costs_its_plan_one_more_turn(tmp_path: Path) -> None:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}})
    second = nodes.add_node(num_cpus=1)
    said: list[str] = []
    gone: list[threading.Thread] = []

    def on_result(result) -> None:
        beside = [worker for worker in pool.workers if worker.state == "busy"]
        if beside and not gone:  # the other worker is in the middle of a plan
            gone.append(threading.Thread(target=nodes.remove_node, args=(second, False)))
            gone[0].start()

    try:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with cluster(nodes.address) as resources:
            assert signal.getsignal(signal.SIGTERM) == on_sigterm
            assert [node["CPU"] for node in resources] == [1, 1]
            assert fitting(resources, num_cpus=0.5, num_gpus=0) == 4
            assert fitting(resources, num_cpus=2, num_gpus=0) == 0
            settings = json.dumps({"log": str(tmp_path / "scored.txt"), "seconds": 1})
            assert in_memory(resources, 1 << 20) >= 2
            crew = RayCrew(cheap.MAKE, settings, num_cpus=1, num_gpus=0, memory=1 << 20)
            with Pool(crew, 2, say=said.append) as pool:
                with open_study("s", storage=None, folder=tmp_path) as store:
                    found = run_search(
                        store, cheap.search(), pool, n_trials=12, on_result=on_result
                    )
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert len({r.plan.digest for r in found}) == len(found) == 12
    assert {r.status for r in found} == {"complete"}
    began = cheap.scored(tmp_path)
    assert len(began) == 13 and len(set(began)) == 12  # the plan of the node, once more
    assert sum("its plan is scored again" in line for line in said) == 1


@pytest.mark.slow
def test_a_node_that_joins_is_given_a_worker(tmp_path: Path) -> None:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    joined: list[int] = []

    def on_result(result) -> None:
        if not joined:
            nodes.add_node(num_cpus=1)
        joined.append(len(pool.workers))

    try:
        with cluster(nodes.address):
            settings = json.dumps({"log": str(tmp_path / "scored.txt"), "seconds": 0.5})
            crew = RayCrew(cheap.MAKE, settings, num_cpus=1, num_gpus=0)
            may_have = partial(fitting, num_cpus=1, num_gpus=0)
            with Pool(crew, 1, may_have=lambda: may_have(living_nodes())) as pool:
                with open_study("s", storage=None, folder=tmp_path) as store:
                    found = run_search(
                        store, cheap.search(), pool, n_trials=12, on_result=on_result
                    )
                assert [worker.state for worker in pool.workers] == ["free", "free"]
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert len(found) == 12
    assert (joined[0], joined[-1]) == (1, 2)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "127.0.0.1:port"])
def test_an_address_where_nobody_listens_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=f"no Ray cluster listens at executor.address={address}"):
        with cluster(address):
            pass


VERSIONS = "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.11.7"
FAILURES = {
    "answers": (
        RuntimeError(VERSIONS),
        r"^the Ray cluster at executor\.address={} refuses \(Version",
    ),
    "auto": (ConnectionError("Could not find one"), "^no Ray cluster listens at .*=auto"),
    # Where a start takes too long, Ray's error has no type of its own.
    "local": (
        Exception("The node timed out.\nMore"),
        r"^Ray does not start here \(The node timed out",
    ),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_ray_that_fails_says_why_in_a_line(where: str, monkeypatch) -> None:
    error, line = FAILURES[where]

    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = f"127.0.0.1:{server.getsockname()[1]}"
        address = answers if where == "answers" else where
        with pytest.raises(InputError, match=line.format(answers)) as refused:
            with cluster(address):
                pass
    check_refusal(f"kvsharer: {refused.value}", "Ray")


def test_a_worker_fits_on_one_node_or_not_at_all() -> None:
    four = [{"CPU": 8.0, "GPU": 1.0}] * 4
    assert fitting(four, num_cpus=1, num_gpus=4) == 0
    assert fitting(four, num_cpus=1, num_gpus=1) == 4
    assert fitting(four, num_cpus=3, num_gpus=0) == 8
    shared = [{"CPU": 1.0, "GPU": 3.0}, {"GPU": 9.0}, {}]
    assert fitting(shared, num_cpus=0.1, num_gpus=0.3) == 9  # three on each GPU
    assert fitting(shared, num_cpus=0.2, num_gpus=0.3) == 5
    assert fitting([], num_cpus=1, num_gpus=0) == 0
    unlike = [{"CPU": 8.0, "memory": 5e9}, {"CPU": 8.0, "memory": 19e9}, {"CPU": 1.0}]
    assert fitting(unlike, num_cpus=1, num_gpus=0, memory=3 * 10**9) == 1 + 6
    assert fitting(unlike, num_cpus=2, num_gpus=0, memory=3 * 10**9) == 1 + 4
    assert in_memory(unlike, 3 * 10**9) == 1 + 6


_LISTENING = """
import psutil
from kvsharer_exp.search.execution.ray_cluster import cluster

with cluster("local"):
    import ray

    assert ray.get(ray.remote(lambda: 1).remote()) == 1  # a worker process is there too
    here = psutil.Process()
    ours = {here.pid, *(child.pid for child in here.children(recursive=True))}
    found = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in ours]
    print(*(connection.laddr.ip for connection in found))
"""


def test_a_ray_that_is_started_here_listens_on_the_loopback_interface() -> None:
    listening = subprocess.check_output([sys.executable, "-c", _LISTENING], text=True).split()
    assert len(listening) >= 4  # Ray's head, its node, this process, and the worker
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}

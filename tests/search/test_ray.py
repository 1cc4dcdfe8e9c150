"""Executors on a Ray cluster of two nodes, both on this machine, of which one goes away."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.pool import Pool
from kvsharer_exp.search.execution.ray_cluster import RayCrew, cluster
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
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
            assert resources["CPU"] == 2
            settings = json.dumps({"log": str(tmp_path / "scored.txt"), "seconds": 1})
            crew = RayCrew(cheap.MAKE, settings, num_cpus=1, num_gpus=0)
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


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "127.0.0.1:port"])
def test_an_address_where_nobody_listens_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=f"no Ray cluster listens at executor.address={address}"):
        with cluster(address):
            pass


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

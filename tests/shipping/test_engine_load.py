"""What is measured on a server: log-likelihoods of tokens, and how a load is carried."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsharer_exp import load_exported, load_model
from kvsharer_exp.shipping.vllm import load as module
from kvsharer_exp.shipping.vllm.blocks import predicted_blocks
from kvsharer_exp.shipping.vllm.client import CacheReport, EngineError
from kvsharer_exp.shipping.vllm.likelihoods import LikelihoodClient
from kvsharer_exp.shipping.vllm.load import LoadClient, requests_that_fit
from kvsharer_exp.shipping.vllm.server import Server, Serving
from kvsharer_exp.values.ports import free_port
from tests.engines import fake_settings
from tests.shipping.exports import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_model("tiny", device="cpu")[1]
    return export("llama", tokenizer, tmp_path_factory.mktemp("exports") / "export")


def serving(folder: Path, place: Path, behaviour: str) -> Server:
    settings = tuple(fake_settings(behaviour, place / "pids").items())
    asked = Serving(
        sys.executable, folder, free_port(), "model", dtype="float32", settings=settings
    )
    return Server(asked, place / "server.log")


@pytest.fixture(scope="module")
def honest(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(exported, tmp_path_factory.mktemp("honest"), "honest") as server:
        yield server


def test_log_likelihoods_are_those_of_the_model(honest: Server, exported: Path) -> None:
    model: Any = load_exported(exported)[0].float()
    client = LikelihoodClient(honest.client.address, honest.client.model)
    greedy = honest.client.complete([5, 6, 7], 3)
    requests = [([5, 6, 7], [8, 9]), ([5, 6, 7], greedy), ([9], [4] * 5)]
    found = client.log_likelihoods(requests, at_once=3)
    for (context, continuation), (total, is_greedy) in zip(requests, found, strict=True):
        rows = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
        wanted = sum(
            float(rows[len(context) - 1 + place, token]) for place, token in enumerate(continuation)
        )
        assert total == pytest.approx(wanted, abs=1e-5)
        assert is_greedy is (continuation == greedy)


def test_a_server_without_log_likelihoods_is_an_error(exported: Path, tmp_path: Path) -> None:
    with serving(exported, tmp_path, "constant") as server:
        client = LikelihoodClient(server.client.address, server.client.model)
        with pytest.raises(EngineError, match="gives no log-likelihoods"):
            client.log_likelihood([5], [6])


def test_a_burst_counts_only_what_it_sent(exported: Path, tmp_path: Path) -> None:
    with serving(exported, tmp_path, "constant") as server:
        client = LoadClient(server.client.address, server.client.model)
        for number in (4, 6):  # the second time the counters do not begin at 0
            burst = client.burst([[1, 2]] * number, 10)
            assert (burst.token_seconds, burst.preemptions) == (0.5, 3 * number)
            assert burst.tokens_per_second > 10


def test_an_engine_that_counts_nothing_is_an_error(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.1)
    with serving(exported, tmp_path, "forgets") as server:
        client = LoadClient(server.client.address, server.client.model)
        with pytest.raises(EngineError, match="counts 0 of 2 requests"):
            client.burst([[1], [2]], 3)


@pytest.mark.parametrize(
    ("tokens", "fit"),
    [(16, 60), (17, 30), (32, 30), (33, 20), (960, 1), (961, 0)],
)
def test_requests_that_fit_are_whole_blocks_beside_the_one_of_vllm(tokens: int, fit: int) -> None:
    predicted = predicted_blocks([None] * 3, memory_bytes=61 * 30, block_size=16, page_bytes=10)
    report = CacheReport(predicted.num_blocks, 16, 0)
    assert report.num_blocks == 61
    assert requests_that_fit(report, predicted, tokens) == fit

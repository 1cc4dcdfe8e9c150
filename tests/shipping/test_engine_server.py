"""A server starts, answers and is gone: whatever happens in between."""

import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from kvsharer_exp.cli.stopping import Terminated, stops_on_sigterm
from kvsharer_exp.shipping.vllm import server as module
from kvsharer_exp.shipping.vllm.client import CacheReport, EngineError
from kvsharer_exp.shipping.vllm.server import Server, Serving, last_error
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.ports import free_port
from tests.engines import fake_settings, left


@pytest.fixture
def make(tmp_path: Path):
    """A server of the fake engine, and the file with its process ids."""

    def call(behaviour: str, start_seconds: float = 60) -> tuple[Server, Path]:
        pids = tmp_path / "pids"
        serving = Serving(
            python=sys.executable,
            folder=tmp_path,
            port=free_port(),
            name="model",
            kv_gib=0.25,
            settings=tuple(fake_settings(behaviour, pids, blocks=7).items()),
        )
        return Server(serving, tmp_path / "server.log", start_seconds=start_seconds), pids

    return call


def test_it_answers_in_the_block_and_is_gone_after_it(make) -> None:
    server, pids = make("constant")
    with server:
        assert len(left(pids)) == 2
        assert server.client.complete_all([[1], [1, 2]], 3, at_once=2) == [[5, 5, 5], [5, 5, 5]]
        assert server.client.cache_report() == CacheReport(7, 16, 64)
        with pytest.raises(EngineError, match=r"refuses \(400\): .*max_tokens is too large"):
            server.client.complete([1], 2000)
    assert left(pids) == []
    assert not server.client.is_healthy()
    with pytest.raises(EngineError, match="does not answer"):
        server.client.complete([1], 3)
    with server:  # again, on the same port
        assert server.client.is_healthy()
    assert left(pids) == []


def test_an_error_in_the_block_ends_it(make) -> None:
    server, pids = make("constant")
    with pytest.raises(KeyError), server:
        raise KeyError
    assert left(pids) == []


def test_who_does_not_hear_sigterm_is_killed(make, monkeypatch) -> None:
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.2)
    server, pids = make("deaf")
    with server:
        pass
    assert left(pids) == []


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_during_the_start_ends_it(make, number: signal.Signals, error: type) -> None:
    server, pids = make("hangs")

    def send() -> None:
        while not pids.is_file() or len(pids.read_text().split()) < 2:
            time.sleep(0.02)
        signal.raise_signal(number)

    threading.Thread(target=send).start()
    with stops_on_sigterm(), pytest.raises(error), server:
        pytest.fail("it never answers")
    assert left(pids) == []


def test_a_second_ctrl_c_while_it_stops_ends_it_at_once(make, monkeypatch) -> None:
    server, pids = make("deaf")
    with pytest.raises(KeyboardInterrupt), server:
        again = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        again.start()
        started = time.monotonic()
    assert time.monotonic() - started < 5 < module._STOP_SECONDS
    assert left(pids) == []


def test_a_start_that_takes_too_long(make) -> None:
    server, pids = make("hangs", start_seconds=1)
    with pytest.raises(EngineError, match=r"did not start in 1 s: see .*server\.log"), server:
        pytest.fail("it never answers")
    assert left(pids) == []


def test_a_failed_start_names_the_reason_and_the_log(make) -> None:
    server, pids = make("fails")
    with pytest.raises(EngineError) as caught, server:
        pytest.fail("it does not start")
    assert "(ValueError: no such thing as this model): see " in str(caught.value)
    assert str(caught.value).endswith("server.log")
    assert "Traceback" in server.log.read_text()
    assert left(pids) == []


def test_too_little_memory_names_the_keys(make) -> None:
    server, pids = make("no_room")
    with pytest.raises(InputError) as caught, server:
        pytest.fail("it does not start")
    assert str(caught.value) == (
        "serve.kv_gib=0.25 holds no request of 1024 tokens (0.02 GiB): give more, or a smaller "
        "serve.max_len"
    )
    assert left(pids) == []


def test_a_port_in_use_is_refused_before_anything_starts(make) -> None:
    server, pids = make("constant")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.serving.port))
        taken.listen()
        with pytest.raises(InputError, match=r"is in use: give another with serve\.port="), server:
            pytest.fail("the port is taken")
    assert not pids.exists() and not server.log.exists()


def test_the_line_says_all_that_is_asked_for() -> None:
    serving = Serving("py", Path("/a b"), 80, "m", 0.5, 99, "bfloat16", True, ("--x",))
    assert serving.line.startswith("env VLLM_PLUGINS=kvsharer_exp ")
    assert serving.line.endswith(
        "py -m vllm.entrypoints.openai.api_server --model '/a b' --served-model-name m "
        "--host 127.0.0.1 --port 80 --dtype bfloat16 --max-model-len 99 "
        "--kv-cache-memory-bytes 536870912 --enforce-eager --x"
    )


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "it printed nothing"),
        ("one\ntwo\n\n", "two"),
        ("api_server.py: error: argument --dtype: bad\n", "api_server.py: error: argument --dtype"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Model architectures ['X'] are not supported [type=value_error]\n"
            "    For further information visit https://errors.pydantic.dev\n",
            "Model architectures ['X'] are not supported [type=value_error]",
        ),
        (
            "(Worker pid=1) ERROR 11-26 20:49:26 [a.py:1] kvsharer_exp.values.errors.InputError: "
            "layer 3 cannot\nRuntimeError: Engine core failed. See root cause above.\nmore\n",
            "kvsharer_exp.values.errors.InputError: layer 3 cannot",
        ),
        ("RuntimeError: failed. See root cause above.\n", "RuntimeError: failed. See root"),
    ],
)
def test_the_reason_is_found_in_what_vllm_prints(log: str, reason: str) -> None:
    assert last_error(log).startswith(reason)

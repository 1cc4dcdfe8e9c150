"""Find a port of this machine on which a server may listen, before one is started."""

from __future__ import annotations

import errno
import socket

from kvsharer_exp.values.errors import InputError

LOOPBACK = "127.0.0.1"


def check_port(key: str, port: int) -> None:
    """Refuse a ``port``, the value of ``key``, on which no server can listen.

    Raises:
        InputError: it is in use, or not allowed.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"is in use: give another with {key}="
            else:
                reason = f"cannot be used ({error.strerror}): give one above 1023 with {key}="
            raise InputError(f"port {port} {reason}") from error


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])

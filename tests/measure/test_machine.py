"""What `settle` does to a process: a user's own setting stays, freed memory is kept."""

import os
import subprocess
import sys

import pytest

HELD_AFTER_FREE = """
import ctypes, sys
from kvsharer_exp.measure.machine import settle
if "settle" in sys.argv: settle()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def pages(): return int(open("/proc/self/statm").read().split()[1])
def work():
    held = [libc.malloc(40 << 20) for _ in range(2)]
    for block in held: ctypes.memset(block, 1, 40 << 20)
    for block in held: libc.free(block)
before = pages()
work(), work()
print((pages() - before) * 4096 >> 20)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept() -> None:
    assert int(run(HELD_AFTER_FREE)) < 40
    assert int(run(HELD_AFTER_FREE, "settle")) >= 79  # MiB, of 80


@pytest.mark.parametrize(
    ("name", "own"), [("OMP_WAIT_POLICY", "ACTIVE"), ("OPENBLAS_NUM_THREADS", "3")]
)
def test_a_setting_of_the_users_own_stays(name: str, own: str) -> None:
    code = "from kvsharer_exp.measure.machine import settle; settle()\n"
    code += f"import os; print(os.environ[{name!r}])"
    assert run(code, **{name: own}).strip() == own


def test_the_command_line_settles_before_numpy_and_torch() -> None:
    code = "import sys, kvsharer_exp.cli.main\nprint({'numpy', 'torch'} & set(sys.modules))"
    assert run(code).strip() == "set()"

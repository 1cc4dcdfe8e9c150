"""Settings of this process that make it faster on a CPU; none of them changes a score.

The command line calls `settle` when it starts.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def settle() -> None:
    """Stop waiting threads from spinning, and keep freed memory for the next tensor.

    Call this before torch and numpy are imported. Environment variables that the user set stay.

    - OpenMP's waiting threads would spin. Beside one busy neighbour, that made a forward 7 times
      slower (2 cores). Alone, it changes nothing.
    - The threads of OpenBLAS, which numpy uses, would spin too. Beside a sweep, two threads took 6
      times as long as one for a sampler's matrices (436 × 436). Alone, they took as long as one.
    - glibc gives freed memory back: the top of its heap, and every tensor of 32 MiB or more (the
      logits of a window are larger). The next layer or map faults it in again: 230,000 page faults
      in a prefill of 2048 tokens, a million for a map scored on 24 windows of 256 tokens. If the
      memory is kept, scoring that map takes 0.7 of the time, and 0.45 when resumed at a late layer,
      with the same peak memory. Less KV is then no longer slower than more. Other C libraries are
      left alone.
    - torch's profiler, which counts allocations, would say on the terminal that it begins and ends.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)

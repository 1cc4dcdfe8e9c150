"""Settings of this process that make it faster on a CPU; none changes a score."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def settle() -> None:
    """Call before torch and numpy are imported. Environment variables of the user's own stay.

    - OpenMP's waiting threads would spin: beside one busy neighbour that made a forward 7 times
      slower (2 cores), alone it changes nothing.
    - So would OpenBLAS's, which numpy uses: beside a sweep two threads took 6 times as long as one
      for a sampler's matrices (436 × 436), alone as long.
    - glibc gives the top of its heap back and the next layer faults it in again: 230,000 page
      faults in a prefill of 2048 tokens, 280,000 with shared layers, which hold less. Kept, scoring
      a map is 10 % faster and less KV is no longer slower than more. From 32 MiB on, where glibc's
      own threshold ends, tensors are still mapped one by one. Other C libraries are left alone.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)

"""Settings of this process that make it faster on a CPU; none changes a score."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def settle() -> None:
    """Call before torch and numpy are imported. Environment variables of the user's own stay.

    - OpenMP's waiting threads would spin: beside one busy neighbour that made a forward 7 times
      slower (2 cores), alone it changes nothing.
    - So would OpenBLAS's, which numpy uses: beside a sweep two threads took 6 times as long as one
      for a sampler's matrices (436 × 436), alone as long.
    - glibc gives freed memory back, the top of its heap and every tensor of 32 MiB or more (the
      logits of a window are larger), and the next layer or map faults it in again: 230,000 page
      faults in a prefill of 2048 tokens, a million a map scored on 24 × 256. Kept, scoring that map
      takes 0.7 of the time, resumed at a late layer 0.45, with the same peak memory, and less KV is
      no longer slower than more. Other C libraries are left alone.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)

"""The strategy ``beam``: forward selection by the measured loss of whole maps.

`samplers.make_sampler` makes it for ``sampler=beam``, and `MapSampler` asks it for maps.

The best ``width`` maps of one size are extended by one more pair each. The extensions are tried in
the order of the losses that `LossModel` expects of them, ``tries`` per size. The best of those
measured are extended next. When every size has had its turn, the next round tries as many more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvsharer_exp.search.strategies.memory import Memory
from kvsharer_exp.values.errors import at_least
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(frozen=True, slots=True)
class Beam:
    """Proposes extensions of the best maps (`map_sampler.Strategy`).

    Args:
        width: number of maps of each size that are extended, >= 1.
        tries: number of maps measured per size and round, >= 1.
    """

    width: int = 2
    tries: int = 10

    def __post_init__(self) -> None:
        at_least("sampler.options.width", self.width, 1)
        at_least("sampler.options.tries", self.tries, 1)

    def propose(self, memory: Memory, rng: np.random.Generator) -> Iterator[SharingMap]:
        sizes = range(1, memory.space.max_shared + 1)
        tried = memory.counts()
        rounds = min(tried[size] for size in sizes) // self.tries
        for more in range(rounds + 1, rounds + 4):
            for size in sizes:
                if tried[size] < more * self.tries:
                    yield from self._extensions(memory, rng, size)

    def _extensions(
        self, memory: Memory, rng: np.random.Generator, size: int
    ) -> Iterator[SharingMap]:
        """All extensions to ``size`` targets, the one expected to lose least first."""
        # The model learns from single pairs, so among them what is uncertain gets tried as well.
        costs = memory.model.draw(rng, 1.0 if size == 1 else 0.0)
        made = (
            parent.share(target, source)
            for parent in memory.best(self.width).get(size - 1, [])
            for target, source in memory.model.terms.keys
            if target not in parent.targets
        )
        yield from memory.ranked(made, costs)

"""SnapKV and H2O by their definitions: one token, one head and one list at a time."""

import torch


def snap_positions(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, keep: int, observe: int
) -> list[int]:
    """What one KV head keeps of a prompt: queries (group, tokens, dim), keys (tokens, dim)."""
    length = len(keys)
    if length <= keep:
        return list(range(length))
    last = min(observe, length)
    votes = [0.0] * (length - last)
    for query in range(length - last, length):
        for head in queries:
            weights = (keys[: query + 1] @ head[query] * scaling).softmax(0).tolist()
            for token in range(length - last):
                votes[token] += weights[token]
    smooth = [sum(votes[max(0, t - 2) : t + 3]) for t in range(length - last)]
    chosen = sorted(range(length - last), key=lambda t: -smooth[t])[: keep - last]
    return sorted(chosen) + list(range(length - last, length))


class Heavy:
    """The tokens that one KV head keeps, and the attention that each has got."""

    def __init__(self, keep: int) -> None:
        self.keep, self.recent = keep, keep - keep // 2
        self.sums: dict[int, float] = {}

    def prompt(self, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        for query in range(len(keys)):
            self.sums[query] = 0.0
            for head in queries:
                weights = (keys[: query + 1] @ head[query] * scaling).softmax(0).tolist()
                for token, weight in enumerate(weights):
                    self.sums[token] += weight
        while len(self.sums) > self.keep:
            self._evict()

    def step(self, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> list[int]:
        """Read the newest of ``keys`` with queries (group, dim); what it reads, in order."""
        self.sums[len(keys) - 1] = 0.0
        read = sorted(self.sums)
        for head in queries:
            weights = (keys[read] @ head * scaling).softmax(0).tolist()
            for token, weight in zip(read, weights, strict=True):
                self.sums[token] += weight
        if len(self.sums) > self.keep:
            self._evict()
        return read

    def _evict(self) -> None:
        old = sorted(self.sums)[: -self.recent]
        del self.sums[min(old, key=lambda token: self.sums[token])]

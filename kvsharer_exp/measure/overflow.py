"""Where a forward first leaves the finite numbers: the window and the layer, for the message.

Half precision overflows in some models under some maps. Whoever finds a value that is not finite
calls `overflow`, which runs the window once more and says in which layer it began.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.values.finite import NotFiniteError


def overflow(
    model: Any, layers: tuple[AttentionLayer, ...], tokens: torch.Tensor, window: int
) -> NotFiniteError:
    """The error for ``tokens`` (window_tokens,), which is the window of that number.

    The model runs as it is now, so call this under the map that was scored.
    """
    broken: list[int] = []

    def look(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.isfinite().all():
            broken.append(index)

    with ExitStack() as undo, torch.inference_mode():
        for layer in layers:
            handle = layer.block.register_forward_hook(
                lambda module, args, output, index=layer.index: look(index, output)
            )
            undo.callback(handle.remove)
        logits = model(tokens[None].to(input_device(model)), use_cache=False).logits
    kind = "NaN" if logits.isnan().any() else "infinity"
    place = f"at layer {broken[0]}" if broken else "in the logits"
    return NotFiniteError(f"{kind} in window {window} {place}: try model.dtype=bfloat16 or float32")

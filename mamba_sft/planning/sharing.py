"""The memory of each of many processes, given what one alone takes."""

from __future__ import annotations

from mamba_sft.planning.communication import GRADIENT_BYTES, Mode
from mamba_sft.planning.memory import Part, Work, weights


def shared_parts(mode: Mode, parts: dict[Part, int], work: Work, processes: int) -> dict[Part, int]:
    """Returns the memory of each process, given that of one alone.

    ddp holds everything, and the gradients once more, in the buckets it sends. fsdp splits weights, adapter,
    gradients and optimizer state, and holds whole what is outside of the layers, and two of the layers: one
    at work and one on its way. zero2 splits gradients and optimizer state, and holds one set of gradients
    whole while they are sent. What the forward keeps is each process's own in all of them.

    Args:
        mode: How the processes share the work.
        parts: From `planned_parts`.
        work: A micro-batch of one of them.
        processes: All of them.
    """
    if processes == 1:
        return parts
    found, gradients = dict(parts), GRADIENT_BYTES * work.trained
    if mode == "ddp":
        found["gradients"] += gradients
        return found
    for name in ("gradients", "optimizer"):
        found[name] = -(-parts[name] // processes)  # type: ignore[index, literal-required]
    if mode == "zero2":
        found["gradients"] += gradients
        return found
    found["adapter"] = -(-parts["adapter"] // processes)
    whole, shape = weights(work), work.shape
    value = 4 if work.is_full else work.itemsize
    outside = min(whole, shape.matrix * (1 if shape.tied else 2) * value)
    layer = (whole - outside) // shape.layers
    if work.is_full:  # each gradient is whole until its layer's are sent
        found["gradients"] += outside + layer
    found["weights"] = min(whole, -(-whole // processes) + outside + 2 * layer)
    return found

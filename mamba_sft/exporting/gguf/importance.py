"""An importance matrix: how much each input of each projection matters, from text that the model reads.

The statistic is llama.cpp's: the mean of the squared inputs, by column. Quantizing then rounds so that the
columns that carry more are off by less. It helps most at two and three bits and changes no size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mamba_sft.errors import ModelError
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.tensors import gguf_name
from mamba_sft.exporting.logits import logits_of


def importance_matrix(
    model: FullModel,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Returns the mean square of each projection's inputs, (columns,) in float32, by GGUF name.

    Args:
        model: The model.
        windows: Token ids of the text it reads; each window is read by itself.
        progress: Called after each layer with the number done and the total.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        sums[name] = sums.get(name, torch.zeros(())) + rows.square().sum(0).cpu()
        counts[name] = counts.get(name, 0) + len(rows)

    logits_of(model, windows, watch=watch, progress=progress)
    found = {}
    for name, total in sums.items():
        key = gguf_name(name)
        if key is None:
            raise ModelError(f"`{name}` has no place in a GGUF file, and so no importance")
        found[key] = (total / counts[name]).float().numpy()
    return found

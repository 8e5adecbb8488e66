"""The model's own logits, computed by `transformers`' blocks one layer at a time, in the memory of one layer.

This is what exported files are held against. The blocks are stock, in float32; nothing of ours computes here
but the walk over the layers. On the way, hooks can watch what goes into each projection: an importance
matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.tensors import layers
from mamba_sft.merging.check import stock_block
from mamba_sft.merging.saved_adapter import EMBEDDINGS, HEAD

Watch = Callable[[str, torch.Tensor], None]
"""Called with the name of a weight in the checkpoint and the inputs it is multiplied with, (..., columns)."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def logits_of(
    model: FullModel,
    windows: Sequence[Sequence[int]],
    *,
    watch: Watch | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[torch.Tensor]:
    """Returns the logits after every token of every window, (L, vocabulary), in float32 on the CPU.

    Args:
        model: The model.
        windows: Token ids; each window is a text of its own.
        watch: Shown the inputs of every projection.
        progress: Called after each layer with the number done and the total.
    """
    from transformers import FalconMambaConfig

    config = FalconMambaConfig.from_dict(model.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = [rows.to(device)[None] for rows in _embed(model, windows)]
    count = layers(model.shapes)
    memory: dict[str, torch.Tensor] = {}
    for layer in range(count):
        prefix = f"backbone.layers.{layer}."
        block = stock_block(config, model.tensors.layer(prefix, memory)).to(device)
        handles = _watch_block(block, f"{prefix}mixer.", watch) if watch else []
        hidden = [block(rows) for rows in hidden]
        for handle in handles:
            handle.remove()
        progress(layer + 1, count)
    return _head(model, config, hidden, watch)


def _embed(model: FullModel, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    ids = [torch.tensor(list(window)) for window in windows]
    width = model.shapes[EMBEDDINGS][1]
    found = [torch.empty(len(window), width) for window in ids]
    for start, rows in model.tensors.blocks(EMBEDDINGS):
        for window, out in zip(ids, found, strict=True):
            inside = (window >= start) & (window < start + len(rows))
            out[inside] = rows[window[inside] - start].float()
    return found


def _watch_block(block: Any, prefix: str, watch: Watch) -> list[Any]:
    mixer = block.mixer

    def input_of(leaf: str) -> Callable[..., None]:
        return lambda module, inputs: watch(f"{prefix}{leaf}.weight", inputs[0])

    handles = [
        getattr(mixer, leaf).register_forward_pre_hook(input_of(leaf))
        for leaf in ("in_proj", "x_proj", "out_proj")
    ]
    # inference multiplies by `dt_proj.weight` itself, so the module's own hook would never run
    handles.append(
        mixer.dt_layernorm.register_forward_hook(
            lambda module, inputs, output: watch(f"{prefix}dt_proj.weight", output)
        )
    )
    return handles


def _head(
    model: FullModel, config: Any, hidden: list[torch.Tensor], watch: Watch | None
) -> list[torch.Tensor]:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaRMSNorm

    norm = FalconMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
    norm.weight.data = model.tensors.whole("backbone.norm_f.weight")
    normed = [norm(rows.cpu())[0] for rows in hidden]
    name = EMBEDDINGS if model.tied else HEAD
    if watch:
        for rows in normed:
            watch(name, rows)
    logits = [torch.empty(len(rows), model.shapes[name][0]) for rows in normed]
    for start, rows in model.tensors.blocks(name):
        for inputs, out in zip(normed, logits, strict=True):
            out[:, start : start + len(rows)] = inputs @ rows.float().T
    return logits

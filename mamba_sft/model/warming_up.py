"""What only the first call has to do, done before the first question: the kernels are compiled, or read."""

from __future__ import annotations

from typing import Any

import torch

from mamba_sft.kernels.falcon_mamba import install


def warm_up(model: Any) -> None:
    """Lets a tiny model, like `model` in all that kernels are compiled for, read tokens and write one.

    Otherwise the first answer waits for the compiler, and what that has to say comes in the middle of it. On
    a GPU nothing is done.

    Args:
        model: A FalconMamba language model with our mixer.
    """
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    if model.device.type != "cpu":
        return
    own = model.config
    config = FalconMambaConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        state_size=own.state_size,
        conv_kernel=own.conv_kernel,
        time_step_rank=4,
        residual_in_fp32=own.residual_in_fp32,
    )
    with torch.device("meta"):  # no random numbers are drawn
        tiny = FalconMambaForCausalLM(config)
    tiny = tiny.to_empty(device="cpu").to(model.dtype).eval()
    with torch.no_grad():
        for tensor in (*tiny.parameters(), *tiny.buffers()):
            tensor.zero_()
        install(tiny)
        read = tiny(torch.zeros(1, 2, dtype=torch.int64), use_cache=True, return_dict=False)
        tiny(torch.zeros(1, 1, dtype=torch.int64), cache_params=read[1], use_cache=True)

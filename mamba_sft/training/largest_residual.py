"""The largest number in the residual stream: what float16 may not hold, and what grows before a run fails."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LargestResidual(TrainerCallback):
    """Watches what every block adds up to while a model trains; the number stays on the device until read."""

    def __init__(self) -> None:
        self._largest: torch.Tensor | None = None
        self._hooks: list[Any] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begins to watch the blocks of `model`."""
        backbone = next(module for module in model.modules() if type(module).__name__ == "FalconMambaModel")
        self._hooks = [block.register_forward_hook(self._see) for block in backbone.layers]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watches no longer."""
        for hook in self._hooks:
            hook.remove()

    def collect(self, accelerator: Any) -> torch.Tensor:
        """Returns the largest number since the last time, over all processes, (1,) on the device."""
        largest, self._largest = self._largest, None
        own = torch.zeros((), device=accelerator.device) if largest is None else largest
        found: torch.Tensor = accelerator.gather(own[None])
        return found.max()[None]

    def _see(self, block: Any, args: Any, output: torch.Tensor) -> None:
        if not block.training:
            return
        low, high = torch.aminmax(output.detach())
        largest = torch.maximum(-low, high).float()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

"""mamba-sft: turn Falcon-Mamba-7B into an instruct model.

The public names are imported on first use, so that `import mamba_sft` (and `mamba-sft --help`) never
imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mamba_sft.noise import drop_noise

if TYPE_CHECKING:
    from mamba_sft.errors import MambaSFTError
    from mamba_sft.exporting.export_run import export
    from mamba_sft.inference.answering import generate
    from mamba_sft.merging.merge_run import merge
    from mamba_sft.recipe.recipe import Recipe
    from mamba_sft.run import Run
    from mamba_sft.training.fine_tuning import train

drop_noise()  # before any module of ours imports a library that would make some

__version__ = "0.1.0"
__all__ = ["MambaSFTError", "Recipe", "Run", "export", "generate", "merge", "train"]

_HOMES = {
    "MambaSFTError": "errors",
    "Recipe": "recipe.recipe",
    "Run": "run",
    "export": "exporting.export_run",
    "generate": "inference.answering",
    "merge": "merging.merge_run",
    "train": "training.fine_tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mamba_sft' has no attribute {name!r}")
    return getattr(import_module(f"mamba_sft.{_HOMES[name]}"), name)

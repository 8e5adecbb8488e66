"""The README.md beside an adapter: what it is on, and how it is loaded, by PEFT alone or not.

PEFT (0.21.2, read 2026-11-27) refuses adapters on `out_proj` and `conv1d` of a FalconMamba, and the model
of transformers (5.23.0, read 2026-11-27) multiplies by the weight of `dt_proj` itself, so that an adapter on
it is loaded and then left out. Whoever is handed an adapter reads of that here: PEFT says half of it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mamba_sft.model.checkpoint import is_hub_id
from mamba_sft.recipe.builtin import find_path
from mamba_sft.run import MODEL_CARD

_REFUSED = ("out_proj", "conv1d")
_LEFT_OUT = ("dt_proj",)
_PLAIN = """With PEFT and transformers alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{adapter}")
tokenizer = AutoTokenizer.from_pretrained("{adapter}")
```
"""
_OURS = """PEFT and transformers alone do not run it: {reason}.
With the mixer of `mamba-sft`, which calls every projection as a module, PEFT does:

```python
import mamba_sft.model.adapter  # lets PEFT put LoRA on this mixer
from mamba_sft.kernels.falcon_mamba import install
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = install(AutoModelForCausalLM.from_pretrained("{base}"))
model = PeftModel.from_pretrained(model, "{adapter}")
tokenizer = AutoTokenizer.from_pretrained("{adapter}")
```

Or merge it into its base, `mamba-sft merge RUN`: any tool loads what comes of that. A later training loads
everywhere unmerged with `adapter.target_modules: [in_proj, x_proj]`.
"""


def write_adapter_card(directory: Path, base: str, targets: Collection[str]) -> None:
    """Writes the README.md of an adapter.

    Args:
        directory: The adapter's.
        base: The model it is on, as the recipe names it.
        targets: The projections it is on.
    """
    of_hub = is_hub_id(base) and "/" in base and not find_path(base).exists()
    head = ["---", "library_name: peft", "tags:", "- mamba-sft", "- lora", "- falcon-mamba"]
    head += [f"base_model: {base}"] if of_hub else []
    reason = _why_not(targets)
    how = _PLAIN if reason is None else _OURS
    names = ", ".join(f"`{name}`" for name in sorted(targets))
    text = how.format(base=base, adapter="DIRECTORY", reason=reason)
    lines = [*head, "---", "", "# Adapter", "", f"LoRA on {names} of `{base}`.", "", text]
    (directory / MODEL_CARD).write_text("\n".join(lines), encoding="utf-8")


def _why_not(targets: Collection[str]) -> str | None:
    """Why PEFT and transformers alone do not run an adapter on these projections; None where they do."""
    leaves = {target.rpartition(".")[2] for target in targets}
    if refused := [name for name in _REFUSED if name in leaves]:
        return f"PEFT refuses `{refused[0]}` on this architecture"
    if left_out := [name for name in _LEFT_OUT if name in leaves]:
        return (
            f"transformers reads the weight of `{left_out[0]}` directly and would leave the adapter on it out"
        )
    return None

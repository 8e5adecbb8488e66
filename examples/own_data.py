"""Chats of your own as a recipe, looked at before anything is trained: `python examples/own_data.py`."""

import json
from pathlib import Path

from mamba_sft import Recipe, plan, preview

pairs = [(f"What is {n} + {n}?", f"{n} + {n} is {2 * n}.") for n in range(200)]
rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
recipe = Recipe.build(
    output_dir="runs/sums",
    model={"base": "data/tiny-base", "dtype": "float32"},
    data={"sources": [{"path": "sums.jsonl"}], "validation": 20},
)
print(preview(recipe, rows=1))
print(plan(recipe))

"""The usage part of a model card: one snippet for each way to run the model.

The tests run every one of them on a tiny model. Two lines are there because leaving them out fails quietly:
`transformers` multiplies by `dt_proj.weight` itself, so that module must stay unquantized; and compiling the
model object would compile nothing, because `generate` calls the method inside.
"""

from __future__ import annotations

import json

from mamba_sft.model.quantization import UNQUANTIZED, misfits
from mamba_sft.model.shape import Shape

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
"""
_TORCH = "import torch\n"
_ASK = """
messages = [{"role": "user", "content": %s}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=%d)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_FAST = """
`transformers` runs the scan in a slow loop unless `mamba-ssm` and `causal-conv1d`, which compile CUDA code,
are installed. `mamba-sft` brings kernels that need no compiler:

```python
from mamba_sft.kernels.falcon_mamba import install

install(model)
```
"""


def usage(repo: str, question: str, shape: Shape, *, max_new_tokens: int = 100) -> str:
    """Returns the section, as Markdown.

    Args:
        repo: What `from_pretrained` is given.
        question: What the snippets ask.
        shape: The model, which decides what is quantized.
        max_new_tokens: The longest answer they wait for.
    """
    ask = _ASK % (_quoted(question), max_new_tokens)
    left_out = misfits(shape, "nf4")
    skipped = json.dumps([*UNQUANTIZED, *left_out])
    why = "read directly, or not whole 4-bit blocks" if left_out else "their weights are read directly"
    load = _LOAD.replace("{repo}", repo)
    four_bit = _TORCH + load.replace("AutoTokenizer\n", "AutoTokenizer, BitsAndBytesConfig\n", 1).replace(
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        "four_bit = BitsAndBytesConfig(\n"
        "    load_in_4bit=True,\n"
        '    bnb_4bit_quant_type="nf4",\n'
        "    bnb_4bit_compute_dtype=torch.bfloat16,\n"
        f"    llm_int8_skip_modules={skipped},  # {why}\n"
        ")\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", quantization_config=four_bit)',
    )
    sections = {
        "Running the model on a CPU": _with(load, repo, 'dtype="float32"'),
        "Running the model on a GPU": _with(load, repo, 'device_map="auto"'),
        "Running the model on a GPU with `torch.compile`": _TORCH
        + _with(load, repo, 'dtype="bfloat16", device_map="auto"')
        + "model.forward = torch.compile(model.forward)  # not the model: `generate` calls its forward\n",
        "FP16": _with(load, repo, 'dtype="float16", device_map="auto"'),
        "4-bit": four_bit,
    }
    parts = ["# Usage\n"]
    for title, code in sections.items():
        parts.append(f"### {title}\n\n```python\n{code}{ask}```\n")
    return "\n".join(parts) + _FAST


def _with(load: str, repo: str, arguments: str) -> str:
    call = f'AutoModelForCausalLM.from_pretrained("{repo}"'
    return load.replace(f"{call})", f"{call}, {arguments})")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

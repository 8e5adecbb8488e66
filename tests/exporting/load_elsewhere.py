"""Loads a checkpoint with whatever transformers is found, and keeps what it computes; nothing of ours.

It is run as a program, in other environments: `python load_elsewhere.py CHECKPOINT RESULT [ADAPTER]`.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = [{"role": "user", "content": "the quick brown fox"}]


def main(checkpoint, result, adapter=None):
    tokenizer = AutoTokenizer.from_pretrained(adapter or checkpoint)
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    facts = {"transformers": transformers.__version__, "odd": sorted(k for k, v in info.items() if v)}
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter)
        except ValueError as error:
            facts["refused"] = str(error)
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(inputs["input_ids"]).logits
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    facts |= {
        "tokenizer": type(tokenizer).__name__,
        "ids": inputs["input_ids"].tolist(),
        "answer": answer.tolist(),
        "stops": model.generation_config.eos_token_id,
        "ours": sorted(name for name in sys.modules if name.startswith("mamba_sft")),
        "logits": logits[0, -1].tolist(),
    }
    with open(result, "w") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

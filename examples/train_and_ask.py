"""Trains the quickstart and asks it: `python examples/train_and_ask.py [STEPS]`, minutes on two cores."""

import sys

from mamba_sft import Recipe, Sampling, generate, train

steps = sys.argv[1] if len(sys.argv) > 1 else "320"
recipe = Recipe.load(
    "quickstart", [f"train.max_steps={steps}", "output_dir=runs/example", "eval.prompts=null"]
)
questions = ["What is the opposite of hot?", "Name the capital of Dosor."]
short = Sampling(max_new_tokens=32)

before = generate(recipe, questions, sampling=short)
run = train(recipe, overwrite=True)
after = generate(run, questions, sampling=short)

print(before.beside(after))
print(run.metrics[["loss", "tokens_per_second"]].tail(3))

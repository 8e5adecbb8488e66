"""Which cards a recipe fits, by plan: `python examples/which_card.py instruct-qlora`. Loads no weights."""

import sys

from mamba_sft import plan

recipe = sys.argv[1] if len(sys.argv) > 1 else "instruct-qlora"
for card in ("t4", "4090", "a100-40", "a100-80", "h100"):
    made = plan(recipe, card=card)
    speed = f"{made.rate.tokens_per_second:,.0f} tokens/s by estimate" if made.rate else "speed unknown"
    verdict = "fits" if made.fits else "does not fit"
    print(f"{card:8} {made.peak / 2**30:5.1f} GiB at most, {verdict:12} {speed}")

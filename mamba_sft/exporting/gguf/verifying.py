"""Whether a written GGUF file is the model: llama.cpp's tokens, logits and answer, against `transformers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mamba_sft.errors import ExportError
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.probe import Job, Seen, run_probe
from mamba_sft.exporting.gguf.types import Method
from mamba_sft.exporting.logits import logits_of
from mamba_sft.exporting.request import Quality
from mamba_sft.exporting.texts import Text, heldout_text, prompt_of
from mamba_sft.run import final_name

HELDOUT_TOKENS = 512
ANSWER_TOKENS = 24
# Mean KL divergence, in nats, beyond which a file is broken and not just rounded. About ten times what
# trained toy models show, which are hurt far more than 7B; a file without the norms of dt, B and C is at 5.
_KL_LIMITS = {
    "F32": 1e-3, "F16": 5e-3, "BF16": 2e-2, "Q8_0": 1e-2, "Q6_K": 5e-2,
    "Q5_K": 0.15, "Q5_1": 0.15, "Q5_0": 0.15, "Q4_K": 0.5, "Q4_1": 0.5, "Q4_0": 0.5, "IQ4_NL": 0.5,
    "IQ4_XS": 0.5, "Q3_K": 1.5, "IQ3_S": 1.5, "Q2_K": 3.0,
}  # fmt: skip
# What trips tokenizers: runs of digits, spaces and punctuation, scripts without spaces, joined emoji, marks
# of a chat.
PROBES = (
    "Hello, world!", " leading space", "trailing space ", "two  spaces   three", "tab\tand\nnewline\r\n\n\n",
    "1 22 333 4444 55555 666666 7777777", "3.14159e-10, 1,000,000 and 0x1F", "a1b22c333",
    "!!! ??? ... --- ''' \"\"\"", "it's I'll you've THEY'RE we'd", "snake_case camelCase kebab-case",
    "def f(x):\n    return x ** 2  # square\n", "naïve café, Größe, señor, Ωmega", "Привет, мир",
    "今日は、世界。価格は1234円", "مرحبا بالعالم", "नमस्ते दुनिया",
    "\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
    "\u200bzero\u200dwidth\ufeff",
    "e\u0301 \u00a0 \u3000", "<b>bold</b> &amp; {\"k\": [1, 2]}", "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>", "C:\\path\\to\\file https://example.org/?q=1#x", "", " ", "\n",
)  # fmt: skip


class Verifier:
    """Holds files of one model against the model.

    Args:
        model: The model.
        progress: Told about the model's own walk over its layers.
    """

    def __init__(self, model: FullModel, progress: Callable[[int, int], None] = lambda done, total: None):
        self.model, self.progress = model, progress
        self.text: Text = heldout_text(model, HELDOUT_TOKENS)
        self.question, self.prompt = prompt_of(model)
        self.reference = logits_of(model, self.text.windows, progress=progress)

    def check(self, file: Path, method: Method, adapter: Path | None = None) -> tuple[Quality, list[int]]:
        """Loads a file through llama.cpp and measures it.

        Args:
            file: The file, under whatever name.
            method: How it is stored.
            adapter: A GGUF LoRA to put on it, or None.

        Returns:
            Its quality, `same_tokens` still open, and the tokens of its answer.

        Raises:
            ExportError: It does not load, cuts text into other tokens, or is off by more than rounding.
        """
        texts = [*PROBES, self.model.tokenizer.decode(self.text.windows[0])]
        seen = run_probe(
            Job(
                str(file),
                texts,
                self.text.windows,
                self.prompt,
                ANSWER_TOKENS,
                adapter=str(adapter) if adapter else None,
            )
        )
        self._compare_tokens(texts, seen, file)
        kl, top1 = compare_logits(self.reference, seen.logits)
        limit = _KL_LIMITS[method.base.name]
        if not kl <= limit:
            raise ExportError(
                f"`{final_name((adapter or file).name)}` is not the model: its next tokens "
                f"on {self.text.origin} are off by {kl:.3g} nats (KL; the limit is {limit:g}), "
                f"{top1:.1%} are the same",
                hint="an unusual model can lose this much; `--no-verify` keeps the file all the same",
            )
        answer = self.model.tokenizer.decode(seen.answer, skip_special_tokens=True)
        tokens = sum(len(window) for window in self.text.windows)
        return Quality(kl, top1, tokens, len(texts), answer, len(seen.answer), 0), seen.answer

    def compare_answers(self, measured: Sequence[tuple[Quality, list[int]]]) -> list[Quality]:
        """Fills in `same_tokens`: one walk over the layers tells what the model itself would have said."""
        longest = max(len(answer) for _, answer in measured)
        if longest == 0:
            return [quality for quality, _ in measured]
        windows = [[*self.prompt, *answer] for _, answer in measured]
        logits = logits_of(self.model, windows, progress=self.progress)
        found = []
        for (quality, answer), rows in zip(measured, logits, strict=True):
            own = rows[len(self.prompt) - 1 : -1].argmax(-1).tolist()
            same = [a == b for a, b in zip(own, answer, strict=True)]
            found.append(replace(quality, same_tokens=same.index(False) if False in same else len(same)))
        return found

    def _compare_tokens(self, texts: Sequence[str], seen: Seen, file: Path) -> None:
        for text, tokens in zip(texts, seen.tokens, strict=True):
            expected = self.model.tokenizer(text, add_special_tokens=False).input_ids
            if tokens != expected:
                raise ExportError(
                    f"`{final_name(file.name)}` cuts {text!r} into other tokens: {tokens[:8]}, "
                    f"the model's tokenizer {expected[:8]}",
                    hint="llama.cpp has no tokenizer that works as this model's; please report it",
                )


def compare_logits(reference: Sequence[torch.Tensor], found: Sequence[Any]) -> tuple[float, float]:
    """Returns mean KL divergence (nats, from `reference` to `found`) and top-1 agreement over all positions.

    Args:
        reference: (L, vocabulary) of each window.
        found: The same, as arrays.
    """
    divergence, same, count = 0.0, 0, 0
    for left, array in zip(reference, found, strict=True):
        for expected, actual in zip(left.split(64), torch.from_numpy(array).split(64), strict=True):
            p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
            divergence += (p.exp() * (p - q)).sum().item()
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    kl = divergence / count
    return (kl if math.isnan(kl) else max(0.0, kl)), same / count

"""The tiny base's tokenizer: byte-level BPE with the structure of Falcon's, trained on the corpus.

As in Falcon's vocabulary, the first rows are the special slots that ordinary text never uses, `>>TITLE<<` to
`>>MIDDLE<<`, then `<|endoftext|>`. There is no chat template and no ChatML token: fine-tuning settles those.

Usage: python data/make_tokenizer.py [DIRECTORY]     default: data/tiny-base
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from make_corpus import documents

SLOTS = [
    ">>TITLE<<", ">>ABSTRACT<<", ">>INTRODUCTION<<", ">>SUMMARY<<", ">>COMMENT<<", ">>ANSWER<<",
    ">>QUESTION<<", ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>",
]  # fmt: skip
VOCAB_SIZE = 1536
DOCUMENTS = 20_000


def build_tokenizer() -> Any:
    """Train the tokenizer; returns a fast transformers tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SLOTS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(seed=0), DOCUMENTS), trainer)
    end = SLOTS[-1]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    fast.model_max_length = 8192
    return fast


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny-base"
    build_tokenizer().save_pretrained(target)
    print(f"wrote {target}")

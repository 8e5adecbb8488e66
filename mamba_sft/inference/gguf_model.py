"""A GGUF file as a model that talks: run by llama.cpp in a process of its own, asked as any other is.

It answers to what `generation` asks of a model, one sequence at a time, so conversations, sampling and
streaming are the same code. Its tokenizer is built from what the file holds, and held against llama.cpp's.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mamba_sft.errors import ModelError
from mamba_sft.llama_cpp.process import GGUFProcess
from mamba_sft.llama_cpp.reading import GGUFFacts, read_facts

_CONTROL, _USER_DEFINED = 3, 4
"""llama.cpp's numbers for tokens that text does not make: marks, and words of their own."""
_PROBES = (
    "Hello, world!  two  spaces\tand\nlines\n\n", "1 22 333 4444 55555", "it's (naïve) café... 今日は 😀",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", "snake_case != camelCase; x = 3.14e-10",
)  # fmt: skip
"""What tells tokenizers apart."""


class GGUFModel:
    """The part of a language model that answering needs, over a process that runs the file.

    Args:
        process: Who runs it.
        state_bytes: Size of the state of one sequence.
    """

    def __init__(self, process: GGUFProcess, state_bytes: int):
        self.process, self.state_bytes = process, state_bytes
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=list(process.ends))

    def __call__(self, input_ids: Any, cache_params: Any = None, **how: Any) -> tuple[Any, Any]:
        """Returns the scores of the next token, (1, 1, vocabulary), and the state that has read the ids.

        Args:
            input_ids: (1, L) int64.
            cache_params: The state to go on from, which is moved on, or None.
            how: Of no meaning here: the cache is used, and the last scores are those that are kept.
        """
        scores, state = self.process.read(input_ids[0].tolist(), cache_params)
        return torch.from_numpy(scores.copy())[None, None], state

    def modules(self) -> Iterator[Any]:
        """Has none: nothing of it is in training mode."""
        return iter(())


def load_gguf(path: Path) -> tuple[GGUFModel, Any]:
    """Starts a file. Returns the model and its tokenizer.

    Raises:
        ModelError: The file is damaged, is of another kind of model, or llama.cpp does not load it.
    """
    facts = read_facts(path)
    tokenizer = _build_tokenizer(path, facts)
    process = GGUFProcess(path)
    for text in _PROBES:
        ours, theirs = tokenizer(text, add_special_tokens=False).input_ids, process.tokenize(text)
        if ours != theirs:
            process.close()
            raise ModelError(
                f"the tokenizer in `{path}` (`{facts.pre}`) cuts {text!r} into other tokens here than in "
                f"llama.cpp: {ours[:8]}, and {theirs[:8]} there",
                hint=f"`llama-cli -m {shlex.quote(str(path))}` talks to it",
            )
    return GGUFModel(process, facts.state_bytes), tokenizer


def _build_tokenizer(path: Path, facts: GGUFFacts) -> Any:
    """A fast tokenizer from a file's tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(facts.tokens) if token is not None}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in facts.merges)]
    try:
        built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ModelError(f"the tokenizer in `{path}` cannot be read: {error}") from error
    built.pre_tokenizer = _pre_tokenizer(path, facts.pre)
    built.decoder = decoders.ByteLevel()
    for token, kind in zip(facts.tokens, facts.types, strict=True):
        if token is not None and kind in (_CONTROL, _USER_DEFINED):
            built.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    special = {f"{kind}_token": facts.tokens[number] for kind, number in facts.ids.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, **special)
    tokenizer.chat_template = facts.template
    return tokenizer


def _pre_tokenizer(path: Path, pre: str) -> Any:
    """How text is split before it is merged, by llama.cpp's name of it."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("gpt-2", "gpt2"):
        return byte_level
    if pre == "falcon":
        digits = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")
        steps = [pre_tokenizers.Punctuation("contiguous"), byte_level, pre_tokenizers.Digits(False), digits]
        return pre_tokenizers.Sequence(steps)
    raise ModelError(
        f"`{path}` splits text as `{pre}`, which is not known here; Falcon's own way is `falcon`",
        hint=f"`llama-cli -m {shlex.quote(str(path))}` talks to it",
    )

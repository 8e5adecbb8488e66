"""What a GGUF file says of its model and tokenizer, and whether it is one that can be talked to here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft.errors import ModelError, UsageError
from mamba_sft.llama_cpp.installed import require_gguf

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_UNUSED = 5
"""llama.cpp's type of a row of the embedding that is no token."""


@dataclass(frozen=True)
class GGUFFacts:
    """What is needed to talk.

    Args:
        tokens: One for every row of the embedding, byte-level characters; None where a row is no token.
        types: llama.cpp's number for the kind of each.
        merges: Pairs, each as `a b`.
        pre: llama.cpp's name of how text is split.
        ids: Special tokens by kind: `bos`, `eos`, `pad`.
        template: The chat template, or None.
        state_bytes: Size of the state of one sequence.
    """

    tokens: list[str | None]
    types: list[int]
    merges: list[str]
    pre: str
    ids: dict[str, int]
    template: str | None
    state_bytes: int


def is_gguf(path: Path) -> bool:
    """Returns whether a name is that of a GGUF file."""
    return path.suffix.lower() == SUFFIX


def check_file(path: Path) -> None:
    """Checks, without loading anything, that a GGUF file is there, and what reads it installed.

    Raises:
        UsageError: There is no such file, or it is something else.
        MambaSFTError: The gguf extra is not installed.
    """
    if not path.is_file():
        raise UsageError(f"no file `{path}`", hint="`mamba-sft export RUN` writes GGUF files")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise UsageError(f"`{path}` is no GGUF file: it begins with {start!r}", hint="was it fetched whole?")
    require_gguf("talking to a GGUF file")


def read_facts(path: Path) -> GGUFFacts:
    """Reads the header of a file.

    Raises:
        ModelError: It cannot be read, or is of a model that this package knows nothing of.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except Exception as error:  # whatever numpy makes of a damaged file
        raise ModelError(
            f"`{path}` is damaged: its header cannot be read", hint="fetch or export it again"
        ) from error

    def value(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    kind, normed = value("general.architecture"), value("mamba.ssm.dt_b_c_rms", False)
    if kind != "mamba" or not normed:
        what = f"`{kind}`" if kind != "mamba" else "plain Mamba, without the norms of Falcon-Mamba"
        raise ModelError(
            f"the model in `{path}` is {what}; here it has to be a Falcon-Mamba",
            hint=f"`llama-cli -m {shlex.quote(str(path))}` talks to it",
        )
    if value("tokenizer.ggml.model") != "gpt2" or not value("tokenizer.ggml.merges"):
        raise ModelError(f"the tokenizer in `{path}` is no byte-level BPE, which Falcon-Mamba's is")
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    ids = {kind: value(f"tokenizer.ggml.{name}_token_id") for kind, name in _KINDS.items()}
    inner, conv, states = (value(f"mamba.ssm.{name}") for name in ("inner_size", "conv_kernel", "state_size"))
    return GGUFFacts(
        tokens=[None if type_ == _UNUSED else token for token, type_ in zip(tokens, types, strict=True)],
        types=list(types),
        merges=value("tokenizer.ggml.merges"),
        pre=value("tokenizer.ggml.pre", "default"),
        ids={kind: number for kind, number in ids.items() if number is not None},
        template=value("tokenizer.chat_template"),
        state_bytes=4 * value("mamba.block_count") * inner * (conv - 1 + states),
    )


_KINDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""Kinds of special tokens, and what their keys call them."""

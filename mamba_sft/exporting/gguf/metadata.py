"""What a GGUF file says about its model and tokenizer, key by key as llama.cpp's own converter writes it.

Two keys are easy to leave out and expensive to miss. Without `mamba.ssm.dt_b_c_rms` the file loads and talks
nonsense: the norms of dt, B and C are skipped. And the list of tokens must have exactly as many entries as
the embedding has rows, or it does not load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter, TokenType, size_label

from mamba_sft.errors import ModelError
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.tensors import DEFAULT_NORM_EPS, ExportTensor, layers
from mamba_sft.exporting.gguf.types import Method
from mamba_sft.merging.saved_adapter import EMBEDDINGS
from mamba_sft.model.loading import first_id
from mamba_sft.model.portable import plain_template

CONTEXT_LENGTH = 2**20  # by llama.cpp's convention: a recurrent model has no limit of its own
# The pre-tokenizers, as `tokenizer.json` describes them, that llama.cpp knows by these names.
_FALCON = [("Punctuation", "Contiguous"), ("ByteLevel",), ("Digits", False), ("Split", "[0-9][0-9][0-9]")]


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer, as GGUF stores it.

    Args:
        tokens: One for every row of the embedding.
        types: Of each: normal, control, user-defined or unused.
        merges: Pairs, each as `a b`.
        pre: llama.cpp's name of the pre-tokenizer.
        ids: Special tokens, by kind: bos, eos, pad, unk.
        template: The chat template, or None.
        adds: Whether `bos` and `eos` are put around a text.
    """

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    ids: dict[str, int]
    template: str | None
    adds: dict[str, bool]


def read_vocabulary(model: FullModel) -> Vocabulary:
    """Reads the model's tokenizer.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind, or the tokenizer has more tokens than rows.
    """
    path = model.tokenizer_dir / "tokenizer.json"
    tokenizer = model.tokenizer
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = model.shapes[EMBEDDINGS][0]
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise ModelError(
            f"the tokenizer in `{path.parent}` knows token {max(vocabulary.values())}, "
            f"but the embedding has {rows} rows",
            hint="tokenizer and weights are of different models",
        )
    by_id = {number: token for token, number in vocabulary.items()}
    added = tokenizer.added_tokens_decoder
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [_token_type(by_id.get(i), added.get(i)) for i in range(rows)]
    alone = tokenizer("a").input_ids
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else _join(merge) for merge in content["model"]["merges"]],
        pre=_pre_tokenizer(content, path),
        ids=_special_ids(model),
        template=plain_template(tokenizer.chat_template),
        adds={
            "bos": tokenizer.bos_token_id is not None and alone[0] == tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id is not None and alone[-1] == tokenizer.eos_token_id,
        },
    )


def add_metadata(
    writer: GGUFWriter, model: FullModel, vocabulary: Vocabulary, tensors: list[ExportTensor], method: Method
) -> None:
    """Adds every key of a model's file to `writer`, which has added the architecture."""
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_size_label(size_label(sum(tensor.values for tensor in tensors), 0, 0, 0))
    if model.base_id is not None:
        owner, _, base = model.base_id.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.replace("-", " ").title())
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{model.base_id}")
    _add_hyperparameters(writer, model)
    writer.add_file_type(method.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_vocabulary(writer, vocabulary)


def _add_hyperparameters(writer: GGUFWriter, model: FullModel) -> None:
    shapes = model.shapes  # not the config: the published one has an `expand` that disagrees with its weights
    layer = "backbone.layers.0.mixer."
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(shapes[EMBEDDINGS][1])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(layers(shapes))
    writer.add_ssm_conv_kernel(shapes[layer + "conv1d.weight"][-1])
    writer.add_ssm_inner_size(shapes[layer + "A_log"][0])
    writer.add_ssm_state_size(shapes[layer + "A_log"][1])
    writer.add_ssm_time_step_rank(shapes[layer + "dt_proj.weight"][1])
    writer.add_layer_norm_rms_eps(float(model.config.get("layer_norm_epsilon", DEFAULT_NORM_EPS)))
    writer.add_ssm_dt_b_c_rms(True)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, number in vocabulary.ids.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _special_ids(model: FullModel) -> dict[str, int]:
    """The tokenizer's ids, else the config's: some list several stop tokens, and GGUF has room for one."""
    found: dict[str, int] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        own = getattr(model.tokenizer, f"{kind}_token_id")
        number = own if own is not None else first_id(model.config.get(f"{kind}_token_id"))
        if number is not None:
            found[kind] = number
    return found


def _token_type(token: str | None, added: Any) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if added is None:
        return TokenType.NORMAL
    looks_special = token.startswith("<|") and token.endswith("|>")
    return TokenType.CONTROL if added.special or looks_special else TokenType.USER_DEFINED


def _join(pair: list[str]) -> str:
    return " ".join(part.replace(" ", "\u0120") for part in pair)


def _pre_tokenizer(content: dict[str, Any], path: Path) -> str:
    if content["model"].get("type") != "BPE" or content.get("normalizer"):
        raise ModelError(
            f"`{path}` is not a plain byte-level BPE tokenizer, which is what is written as GGUF"
        )
    outer = content.get("pre_tokenizer") or {}
    steps = [_describe(step) for step in outer.get("pretokenizers", [outer])]
    if steps == _FALCON:
        return "falcon"
    if steps == [("ByteLevel",)]:
        return "gpt-2"
    raise ModelError(
        f"`{path}` splits text in a way that llama.cpp has no name for: {[step[0] for step in steps]}",
        hint="Falcon's own tokenizer, and GPT-2's, can be exported",
    )


def _describe(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "Punctuation":
        return kind, step.get("behavior")
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split":
        return kind, next(iter(step["pattern"].values()))
    return (kind,)

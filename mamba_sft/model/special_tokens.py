"""Special tokens without a resized matrix: new names for rows of the vocabulary that nothing uses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any


def is_single(tokenizer: Any, token: str) -> bool:
    """Whether `token` is one token of the vocabulary."""
    return len(tokenizer.encode(token, add_special_tokens=False)) == 1


def unused_slots(tokenizer: Any, reserved_ids: Collection[int]) -> list[str]:
    """Names of special rows nothing refers to, in the order of their ids."""
    if not tokenizer.is_fast:
        return []
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    added, vocabulary = pipeline.pop("added_tokens"), pipeline["model"].pop("vocab")
    if not isinstance(vocabulary, dict):
        return []
    named = {*tokenizer.all_special_ids, *reserved_ids}
    elsewhere = json.dumps(
        {part: value for part, value in pipeline.items() if part != "model"}, ensure_ascii=False
    )
    template = tokenizer.chat_template or ""
    return [
        entry["content"]
        for entry in sorted(added, key=lambda entry: entry["id"])
        if entry["special"]
        and entry["id"] not in named
        and entry["content"] not in elsewhere
        and entry["content"] not in str(template)
    ]


def rename_tokens(tokenizer: Any, names: dict[str, str]) -> Any:
    """A copy of `tokenizer` in which the rows `names` are called by their new names; nothing else changes.

    It is edited as saved, so what comes back is by construction what a saved copy loads as.
    """
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for path in Path(directory).glob("*.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_renamed(content, names), ensure_ascii=False), encoding="utf-8")
        copied = type(tokenizer).from_pretrained(directory)
    copied.name_or_path = tokenizer.name_or_path
    copied.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return copied


def _renamed(content: Any, names: dict[str, str]) -> Any:
    if isinstance(content, str):
        return names.get(content, content)
    if isinstance(content, list):
        return [_renamed(entry, names) for entry in content]
    if isinstance(content, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in content.items()}
    return content


def settle_pad(tokenizer: Any, base_eos: int | None, reserved_ids: Collection[int]) -> None:
    """Keeps the pad token apart from the stop token, where the vocabulary has any other to offer."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    offers = [base_eos, tokenizer.bos_token_id, tokenizer.unk_token_id]
    named = [i for i in offers if i is not None and i != tokenizer.eos_token_id]
    slots = [tokenizer.convert_tokens_to_ids(slot) for slot in unused_slots(tokenizer, reserved_ids)]
    candidates = [*named, *slots, tokenizer.eos_token_id]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(candidates[0])

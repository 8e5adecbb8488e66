"""What other tools read of a checkpoint besides its weights, written so that they can.

transformers 5 gives the tokenizer's class a name that transformers 4 does not know, and so it is with the
lists of special tokens; 4 adds token types that FalconMamba refuses unless the config says which inputs there
are (4.57.6 and 5.23.0, read 2026-11-27). Chat templates mark for training what the assistant writes, by a tag
that only transformers has. And an engine stops at the ids of the one file that it reads, so all say the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mamba_sft.run_reading import read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_INPUTS = ["input_ids", "attention_mask"]
_OF_LOADING = ("is_local", "local_files_only")
_MARK = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
_PLAIN_MARK = re.compile(r"\{#([-+]?) ((?:end)?generation) ([-+]?)#\}")


def plain_template(template: Any) -> str | None:
    """Returns a chat template without the marks that only training reads.

    `{% generation %}` is an extension of `transformers`; other renderers refuse it. A comment in its place
    strips the same white space and writes nothing, and says where the mark was.
    """
    return _MARK.sub(r"{#\1 \2 \3#}", template) if isinstance(template, str) else None


def marked_template(template: str) -> str:
    """Returns a chat template with the marks again that `plain_template` made comments of."""
    return _PLAIN_MARK.sub(r"{%\1 \2 \3%}", template)


def settle_tokenizer_config(directory: Path) -> None:
    """Makes a saved tokenizer's config one that transformers 4 and 5 read alike, if there is one."""
    path = directory / TOKENIZER_CONFIG
    config = read_object(path)
    if not config:
        return
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name that 5 has for the same class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for flag in _OF_LOADING:
        config.pop(flag, None)
    if isinstance(config.get("extra_special_tokens"), list):  # 4 has names for each under that key
        more = config.pop("extra_special_tokens")
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *more]
    config.setdefault("model_input_names", _INPUTS)
    _write(path, config, sort_keys=True)


def settle_checkpoint(directory: Path) -> None:
    """Makes all of a checkpoint but its weights what other tools can read; training's own marks are left out.

    Args:
        directory: Its files, none of which is under its final name yet.
    """
    settle_tokenizer_config(directory)
    for pattern in _TEMPLATES:
        for path in directory.glob(pattern):
            path.write_text(plain_template(path.read_text(encoding="utf-8")) or "", encoding="utf-8")
    config = read_object(directory / TOKENIZER_CONFIG)
    inline = plain_template(config.get("chat_template"))
    if inline is not None and inline != config["chat_template"]:
        _write(directory / TOKENIZER_CONFIG, config | {"chat_template": inline}, sort_keys=True)
    _settle_stops(directory, config.get("eos_token"))


def _settle_stops(directory: Path, eos_token: Any) -> None:
    """Writes one list of stop ids into both configs: what either has, and the tokenizer's own."""
    paths = [directory / name for name in ("generation_config.json", "config.json")]
    contents = [read_object(path) for path in paths]
    own = _id_of(directory, eos_token)
    others = [number for content in contents for number in _ids(content.get("eos_token_id"))]
    stops = list(dict.fromkeys([*_ids(own), *others]))
    if not stops:
        return
    told: int | list[int] = stops if len(stops) > 1 else stops[0]
    for path, content in zip(paths, contents, strict=True):
        if content and content.get("eos_token_id") != told:
            _write(path, content | {"eos_token_id": told})


def _ids(value: Any) -> list[int]:
    return [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]


def _id_of(directory: Path, token: Any) -> int | None:
    """The id of a special token, which every tokenizer file lists; None where it is not there."""
    text = token.get("content") if isinstance(token, dict) else token
    added = read_object(directory / "tokenizer.json").get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and entry.get("content") == text and type(entry.get("id")) is int:
            return int(entry["id"])
    return None


def _write(path: Path, content: dict[str, Any], *, sort_keys: bool = False) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")

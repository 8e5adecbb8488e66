"""`adapter_config.json`, read as something that anybody may have written.

An adapter is handed on by people, and its config decides what is allocated, which names are matched and what
is computed. Every value that has a meaning here is of the kind that PEFT writes, or the file is refused, in
one message, before any of it is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mamba_sft.errors import AdapterError, MambaSFTError
from mamba_sft.json_lines import TOO_DEEP, is_too_deep

LONGEST = 10_000_000
"""Bytes of a config; the numbers of all rows of a vocabulary take less."""
_MOST_ROWS = 1 << 20
_MOST_PATTERNS, _MOST_GROUPS, _MOST_REPEATS = 20, 30, 4
_MAKES_A_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Ways to begin that change the base's weights too: what is saved is the difference to another base."""


def read_adapter_config(path: Path, kind: type[MambaSFTError] = AdapterError) -> dict[str, Any]:
    """Returns what the file says; the values that `_RIGHT` names are of the right kind.

    Args:
        path: `adapter_config.json`.
        kind: What is raised.

    Raises:
        MambaSFTError: It cannot be read, is not JSON, names a key twice, or has a value that cannot be.
    """
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than any config")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        if is_too_deep(config):
            raise ValueError(TOO_DEEP)
    except RecursionError:
        raise kind(f"`{path}` is not JSON: {TOO_DEEP}", hint="copy it again") from None
    except ValueError as error:
        raise kind(f"`{path}` is not JSON: {error!s:.200}", hint="copy it again") from error
    except OSError as error:
        raise kind(f"cannot read `{path}`: {error.strerror or error}") from error
    if not isinstance(config, dict):
        raise kind(f"`{path}` is not a JSON object")
    values = {name: config.get(name) for name in _RIGHT}
    wrong = [f"{name}={value!r:.80}" for name, value in values.items() if not _RIGHT[name](value)]
    if wrong and config.get("peft_type") == "LORA":
        raise kind(
            f"`{path}` has values that cannot be: {', '.join(wrong)}",
            hint="PEFT writes this file beside the adapter's weights; copy it again",
        )
    return config


def matches(pattern: str, module: str) -> bool:
    """Returns whether a pattern of `rank_pattern` and its like means a module, as PEFT has it."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in it")
    return found


def is_quick_pattern(pattern: Any) -> bool:
    """Returns whether a regular expression is one whose search is over soon, whatever it is held against.

    Python's search tries all ways in which repeats can share a text between them: few repeats, none of them
    within another. What people write to name layers and projections is far below.
    """
    if not isinstance(pattern, str) or len(pattern) > 1000 or pattern.count("(") > _MOST_GROUPS:
        return False
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", pattern, flags=re.DOTALL).replace("(?", "(")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    repeated = re.search(r"\)\s*[*+{]", bare) or re.search(r"\(\?[aiLmsux-]", pattern)
    return not repeated and len(re.findall(r"[*+?{]", bare)) <= _MOST_REPEATS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _are_patterns(values: Any, is_right: Callable[[Any], bool]) -> bool:
    if values is None:
        return True
    if not isinstance(values, dict) or not all(map(is_right, values.values())):
        return False
    involved = [pattern for pattern in values if not re.fullmatch(r"[\w.]*", pattern)]
    return len(involved) <= _MOST_PATTERNS and all(map(is_quick_pattern, involved))


def _are_names(value: Any) -> bool:
    """A list of names, a pattern, or nothing."""
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or is_quick_pattern(value)


def _are_rows(values: Any) -> bool:
    return isinstance(values, list) and all(type(row) is int and 0 <= row < _MOST_ROWS for row in values)


def _are_layers(value: Any) -> bool:
    return value is None or _are_rows(value if isinstance(value, list) else [value])


def _is_switch(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_beginning(value: Any) -> bool:
    return _is_switch(value) or (isinstance(value, str) and not value.startswith(_MAKES_A_BASE))


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: isinstance(value, str),
    "r": _is_rank,
    "lora_alpha": lambda value: _is_number(value) and value != 0,
    "lora_dropout": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    "bias": lambda value: value in (None, "none", "all", "lora_only"),
    "init_lora_weights": _is_beginning,
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "modules_to_save": lambda value: value is None or (isinstance(value, list) and _are_names(value)),
    "layers_to_transform": _are_layers,
    "layers_pattern": _are_names,
    "rank_pattern": lambda value: _are_patterns(value, _is_rank),
    "alpha_pattern": lambda value: _are_patterns(value, _is_number),
    "trainable_token_indices": lambda value: (
        value is None or _are_rows(value) or (isinstance(value, dict) and _are_patterns(value, _are_rows))
    ),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), _is_switch),
}
HONOURED = tuple(_RIGHT)
"""The fields that mean something here."""
OTHERS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""What else PEFT can do that changes what an adapter means; nothing here can."""


def used(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Returns those of some fields that a config makes use of, each with its value, to be shown."""
    return [f"{name}={config[name]!r:.80}" for name in names if config.get(name)]

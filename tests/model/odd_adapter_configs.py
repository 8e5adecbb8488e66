"""Configs of adapters with something odd in them: any JSON in the place of any value."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

FIELDS = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "trainable_token_indices", "modules_to_save",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_bias", "init_lora_weights", "task_type",
    "base_model_name_or_path", "layer_replication", "target_parameters", "use_bdlora", "kasa_config",
    "loftq_config", "eva_config", "runtime_config", "megatron_config", "alora_invocation_tokens", "revision",
    "arrow_config", "use_qalora", "auto_mapping", "inference_mode", "monteclora_config", "peft_version",
)  # fmt: skip
SLOW = (
    r"(.*)*x", r"((a|.)+)+$", r".?" * 30 + "x", r"(?x)(.+) *y", "(.*.*.*.*.*.*)z", "(" * 200 + ")" * 200, "(",
)  # fmt: skip
"""Patterns that are no names: some take longer than the sun lasts to be held against a name."""
odd = (
    st.none()
    | st.booleans()
    | st.sampled_from((0, -1, 1, 4, 8, 1 << 31, 1 << 64, 10**400, -8, 10**9, 600, 16))
    | st.floats()
    | st.sampled_from(("", "in_proj", "backbone", "all-linear", "none", "all", "\x1b[2J", "pissa", *SLOW))
    | st.text(max_size=6)
)
values = st.recursive(
    odd,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(("in_proj", "embeddings", "lm_head", *SLOW)), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def configs(draw: Any, whole: dict[str, Any]) -> str:
    """A config with one to three of its values changed, as the text of the file."""
    config = dict(whole)
    for name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        config[name] = draw(values)
    text = json.dumps(config)
    what = draw(st.sampled_from(("as it is", "as it is", "as it is", "twice", "deep", "cut")))
    if what == "twice":
        return text[:-1] + ', "r": 4}'
    if what == "deep":
        depth = draw(st.sampled_from((90, 150, 990, 100_000)))
        return text[:-1] + ', "loftq_config": ' + "[" * depth + "]" * depth + "}"
    return text[: draw(st.integers(0, len(text)))] if what == "cut" else text

"""An adapter's config that anybody may have written: one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mamba_sft.errors import MergeError
from mamba_sft.merging.saved_adapter import read_adapter

GOOD = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "null",
        "[" * 100_000,
        *(
            json.dumps(GOOD | change)
            for change in (
                {"r": 0}, {"r": "8"}, {"r": True}, {"r": None}, {"r": [8]}, {"lora_alpha": "x"},
                {"lora_alpha": None},
                {"rank_pattern": [1]}, {"rank_pattern": {"(": 1}}, {"rank_pattern": {"a": 0}},
                {"alpha_pattern": "x"}, {"alpha_pattern": {"a": "b"}},
            )
        ),
    ],
)  # fmt: skip
def test_odd_configs(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(MergeError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)

"""An adapter of other people: merged, trained on and talked to, or refused in one message, and soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_sft import Run, train
from mamba_sft.errors import AdapterError, MambaSFTError
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.merging.preparing import match_adapter
from mamba_sft.model.adapter_config import is_quick_pattern
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.chat_template import TemplateSetup
from mamba_sft.training.starting import check_vocabulary, find_start
from tests.model.odd_adapter_configs import SLOW, configs

fuzzing = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass
class Handed:
    """An adapter whose config can be changed, and all that one can do with it."""

    run: Run
    whole: dict[str, Any]
    uses: dict[str, Callable[[], Any]]

    def answer(self, use: str, text: str) -> str:
        """What becomes of a config: `taken`, or what is said."""
        path = self.run.adapter / "adapter_config.json"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        started, answer = time.process_time(), "taken"
        try:
            self.uses[use]()
        except MambaSFTError as error:
            answer = error.message
        assert time.process_time() - started < 20  # a slow pattern takes longer than any machine's patience
        assert answer == "taken" or str(self.run.adapter) in answer
        assert len(answer) < 4000
        return answer


@pytest.fixture
def handed(recipe: Any, tmp_path: Path) -> Handed:
    run = train(recipe("train.max_steps=1"))
    facts = BaseFacts.read(run.adapter)
    setup = TemplateSetup(None, facts.trained_token_ids, facts.resize_to, "", [])
    second = recipe(f"model.adapter={run.path}", name="second")
    uses: dict[str, Callable[[], Any]] = {
        "merge": lambda: match_adapter(run, tmp_path / "out", None),
        "train": lambda: check_vocabulary(found, setup) if (found := find_start(second)) else None,
        "chat": lambda: load_chat_model(run.adapter),
    }
    return Handed(run, json.loads((run.adapter / "adapter_config.json").read_text()), uses)


@pytest.mark.parametrize("use", ["merge", "train", "chat"])
@fuzzing
@given(data=st.data())
def test_any_config(handed: Handed, use: str, data: Any) -> None:
    handed.answer(use, data.draw(configs(handed.whole)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"target_modules": r".*\.(in_proj|x_proj|out_proj)"},
        {"alpha_pattern": {r"layers\.0\..*": 16}, "lora_alpha": -1},
        {"rank_pattern": {"in_proj": 4}},
    ],
)
def test_a_right_config_is_taken(handed: Handed, change: dict[str, Any]) -> None:
    text = json.dumps(handed.whole | change)
    assert [handed.answer(use, text) for use in ("merge", "chat")] == ["taken", "taken"]
    assert (handed.answer("train", text) == "taken") == (not change)


ODD = (
    *({"r": 10**9}, {"rank_pattern": {"in_proj": 10**9}}, {"rank_pattern": {"in_proj": True}}),
    *({"lora_alpha": 10**400}, {"lora_alpha": float("nan")}, {"lora_alpha": 0}, {"alpha_pattern": []}),
    *({"init_lora_weights": "pissa"}, {"init_lora_weights": []}, {"bias": ["none"]}, {"use_dora": "yes"}),
    *({"trainable_token_indices": rows} for rows in ([1.5], "all", {"a": 1}, {"embeddings": [1 << 40]})),
    *({"target_modules": names} for names in ([1], {"a": 1}, 3, *SLOW)),
    *({"rank_pattern": {pattern: 4}} for pattern in SLOW),
)


@pytest.mark.parametrize("change", ODD, ids=[f"{number}" for number in range(len(ODD))])
def test_an_odd_config_is_refused(handed: Handed, change: dict[str, Any]) -> None:
    for use in handed.uses:
        assert handed.answer(use, json.dumps(handed.whole | change)) != "taken"


def test_a_key_that_stands_twice_or_too_deep(handed: Handed) -> None:
    text = json.dumps(handed.whole)[:-1]
    for use in handed.uses:
        assert "twice" in handed.answer(use, text + ', "r": 4}')
        for depth in (150, 100_000):
            deep = text + ', "x": ' + "[" * depth + "]" * depth + "}"
            assert "nested too deeply" in handed.answer(use, deep)


def test_patterns_that_people_write_are_quick() -> None:
    patterns = (r".*\.(in_proj|x_proj)", "in_proj", r"^backbone\.layers\.(0|1)\.", r"layers\.[0-9]+\..*_proj")
    assert all(map(is_quick_pattern, patterns))
    assert not any(map(is_quick_pattern, SLOW))


FACTS = {
    "base": "b", "revision": None, "fingerprint": "f", "quantization": "none", "dtype": "float32",
    "resize_to": None,
}  # fmt: skip
ODD_FACTS = (
    *({"base": 1}, {"base": ""}, {"quantization": ["nf4"]}, {"dtype": "f"}, {"resize_to": True}),
    *({"resize_to": 1 << 40}, {"trained_token_ids": {}}, {"trained_token_ids": ["1"]}, {"checksums": []}),
    *({"checksums": {"a": 1}}, {"adapter_checksum": 3}, {"revision": []}),
)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "{}", "null", *(json.dumps(FACTS | odd) for odd in ODD_FACTS)]
)
def test_odd_facts_of_the_base(tmp_path: Path, content: str) -> None:
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(AdapterError, match=r"base\.json` does not say which base"):
        BaseFacts.read(tmp_path)
    (tmp_path / "base.json").write_text(json.dumps(FACTS))
    assert BaseFacts.read(tmp_path).base == "b"

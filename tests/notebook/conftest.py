"""A tiny run that was trained once for all tests of the room, and a stand-in for a notebook's kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mamba_sft import Recipe, Run
from tests.conftest import build_model, build_tokenizer

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e & <b>"
"""What a row, an answer or a name may hold, and no page may obey."""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("notebook")
    build_model().save_pretrained(place / "base")
    build_tokenizer().save_pretrained(place / "base")
    turns = [
        [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"quick {i} fox"}]
        for i in range(12)
    ]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (place / "chats.jsonl").write_text("\n".join(lines) + "\n")
    prompts = [{"prompt": HOSTILE, "answer": "yes"}, *({"prompt": f"hello {i}"} for i in range(12))]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return Recipe.build(
        output_dir=str(place / "run"),
        model={"base": str(place / "base"), "dtype": "float32"},
        data={"sources": [{"path": str(place / "chats.jsonl")}], "validation": 2, "max_length": 64},
        adapter={"r": 4},
        train={"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
               "warmup_steps": 0, "logging_steps": 1, "learning_rate": 1e-2},
        eval={"prompts": str(place / "prompts.jsonl"), "max_new_tokens": 2, "eval_steps": 2},
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Recipe) -> Run:
    from mamba_sft import train

    return train(tiny_recipe)


class Kernel:
    """Takes what a notebook would be sent: (output's id, whether it replaces, its HTML)."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, bool, str]] = []

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: str, update: bool) -> None:
        assert raw
        assert set(bundle) == {"text/html", "text/plain"}
        self.shown.append((display_id, update, bundle["text/html"]))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Makes this process look like the kernel of a notebook."""
    kernel = Kernel()
    module: Any = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    display: Any = SimpleNamespace(display=kernel.display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return kernel


def is_safe(html: str) -> bool:
    """Whether what others wrote stays text: no script, no control character, nothing from the net."""
    written = html.replace("http://www.w3.org/2000/svg", "")
    return not any(sign in written for sign in ("<script", "\x1b", "\u202e", "http:", "https:", "url("))


def place_of(run: Run) -> Path:
    return run.path.parent

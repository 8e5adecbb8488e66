"""Nothing that comes with a checkpoint is ever run: no pickle, no code of the hub."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import ModelError
from mamba_sft.model.loading import load_config, load_model, load_tokenizer
from mamba_sft.recipe.fields import ModelSection

PACKAGE = Path(__file__).parents[2] / "mamba_sft"


class Bomb:
    """Makes a directory where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.fixture
def trapped(tiny_base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base full of code, and what would be there if any of it had run."""
    mark = tmp_path / "was run"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "tokenizer.pkl"):
        (tiny_base / name).write_bytes(pickle.dumps(Bomb(mark)))
    (tiny_base / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Model: ...\n")
    (tiny_base / "custom_generate").mkdir()
    (tiny_base / "custom_generate" / "generate.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel")
    auto_map: dict[str, Any] = dict.fromkeys(names, "code.Model") | {
        "AutoTokenizer": ["code.Model", "code.Model"]
    }
    for name in ("config.json", "tokenizer_config.json"):
        path = tiny_base / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    return tiny_base, mark


def test_the_trap_works(trapped: tuple[Path, Path]) -> None:
    base, mark = trapped
    pickle.loads((base / "pytorch_model.bin").read_bytes())
    assert mark.exists()


def test_a_base_full_of_code_is_loaded_without_it(trapped: tuple[Path, Path]) -> None:
    base, mark = trapped
    section = ModelSection(base=str(base), dtype="float32")
    load_config(section)
    assert len(load_tokenizer(section)) > 0
    assert load_model(section, device="cpu") is not None
    assert not mark.exists()


def test_weights_that_are_pickles_only_are_refused_unread(trapped: tuple[Path, Path]) -> None:
    base, mark = trapped
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can run code when opened"):
        load_model(ModelSection(base=str(base)), device="cpu")
    assert not mark.exists()


def test_no_call_takes_code_or_asks_for_it() -> None:
    """Left out, `trust_remote_code` makes transformers ask on the terminal; `torch.load` unpickles."""
    found = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                found += 1
            assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
            assert name not in {"pickle.load", "pickle.loads", "joblib.load"}, f"{path}:{node.lineno}"
            assert name != "torch.load" or given.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
    assert found >= 4

"""Checkpoints on disk: found, refused with a reason, told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba_sft.errors import ModelError
from mamba_sft.model.checkpoint import INDEX_NAME, base_fingerprint, is_hub_id, read_tensors, resolve_base
from tests.conftest import build_model

WEIGHTS = "model.safetensors"


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(directory: Path) -> None:
    """Saves the model of `directory` again, in several shards."""
    build_model().save_pretrained(directory, max_shard_size="100KB")
    (directory / WEIGHTS).unlink(missing_ok=True)


@pytest.mark.parametrize("text", ["gpt2", "tiiuae/falcon-mamba-7b", "a/b.c_d-e", "x" * 96])
def test_what_can_be_a_hub_id(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["", "a/b/c", "/a/b", "./a", "~/a", "a/", "a b", "a--b", "a..b", "a.git", "*.jsonl", "x" * 97]
)
def test_what_cannot_be_a_hub_id(text: str) -> None:
    assert not is_hub_id(text)


def test_no_such_directory(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for base in (str(tiny_base) + "x", "./tiny-bse"):
        monkeypatch.chdir(tiny_base.parent)
        with pytest.raises(ModelError, match="no model directory") as caught:
            resolve_base(base)
        assert "tiny-base`?" in (caught.value.hint or "")


def test_hub_that_cannot_be_reached() -> None:
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        resolve_base("nobody-at-all/no-such-model")
    assert "HF_HUB_OFFLINE" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "no directory and no hub model"),
        ("GatedRepoError", "is gated"),
        ("RevisionNotFoundError", "no revision `v9`"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*args: Any, **kwargs: Any) -> None:
        kind = getattr(errors, name)
        raise kind.__new__(kind)  # their constructors want a response, of a kind that varies between releases

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        resolve_base("someone/model", "v9")


def test_revision_of_a_directory(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="no meaning for the local directory"):
        resolve_base(str(tiny_base), "main")


def test_configs(tiny_base: Path) -> None:
    edit_config(tiny_base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"already quantized \(bitsandbytes\)"):
        resolve_base(str(tiny_base))
    edit_config(tiny_base, quantization_config=None, model_type="mamba")
    with pytest.raises(ModelError, match="is a `mamba` model"):
        resolve_base(str(tiny_base))
    (tiny_base / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json` is not valid JSON"):
        resolve_base(str(tiny_base))
    (tiny_base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no `config\.json`"):
        resolve_base(str(tiny_base))
    (tiny_base / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter"):
        resolve_base(str(tiny_base))
    with pytest.raises(ModelError, match="is a file"):
        resolve_base(str(tiny_base / "tokenizer.json"))


def test_pickles(tiny_base: Path, tiny_model: Any) -> None:
    (tiny_base / WEIGHTS).unlink()
    torch.save(tiny_model.state_dict(), tiny_base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can run code when opened") as caught:
        read_tensors(tiny_base)
    assert "save_pretrained" in (caught.value.hint or "")


def test_broken_weights(tiny_base: Path) -> None:
    whole = (tiny_base / WEIGHTS).read_bytes()
    for content, message in [
        (whole[:-1], "is truncated"),
        (whole[:200], "header cannot be read"),
        (b"", "header cannot be read"),
        (b"\xff" * 4096, "header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    ]:
        (tiny_base / WEIGHTS).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_tensors(tiny_base)
    (tiny_base / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="lacks 1 of 1 weight files"):
        read_tensors(tiny_base)


def test_broken_shards(tiny_base: Path) -> None:
    shard(tiny_base)
    shards = sorted(tiny_base.glob("*.safetensors"))
    contents = {path: path.read_bytes() for path in shards}
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        read_tensors(tiny_base)
    shards[1].write_bytes(contents[shards[0]])
    with pytest.raises(ModelError, match="but it does not"):
        read_tensors(tiny_base)
    (tiny_base / INDEX_NAME).write_text("{}")
    with pytest.raises(ModelError, match="lists no weights"):
        read_tensors(tiny_base)


def test_fingerprint_of_the_same_model(tiny_base: Path, tmp_path: Path) -> None:
    before = base_fingerprint(tiny_base)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    shard(copy)  # other files, same tensors
    edit_config(copy, transformers_version="9.9", _name_or_path="elsewhere", dtype="float32")
    assert base_fingerprint(copy) == before


def test_fingerprint_of_another_model(tiny_base: Path) -> None:
    before = base_fingerprint(tiny_base)
    weights = load_file(tiny_base / WEIGHTS)
    name = "backbone.layers.1.mixer.out_proj.weight"
    tuned = weights | {name: weights[name] + 1e-3 * torch.randn(weights[name].shape)}
    save_file(tuned, tiny_base / WEIGHTS, metadata={"format": "pt"})
    assert base_fingerprint(tiny_base) != before
    save_file(weights, tiny_base / WEIGHTS, metadata={"format": "pt"})
    assert base_fingerprint(tiny_base) == before
    edit_config(tiny_base, layer_norm_epsilon=1e-6)
    assert base_fingerprint(tiny_base) != before
    edit_config(tiny_base, layer_norm_epsilon=1e-5)
    half = {key: value.bfloat16() for key, value in weights.items()}
    save_file(half, tiny_base / WEIGHTS, metadata={"format": "pt"})
    assert base_fingerprint(tiny_base) != before


def test_a_misspelt_bundled_path_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mamba_sft.model import checkpoint

    (tmp_path / "data" / "tiny-base").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "bundled_root", lambda: tmp_path)
    with pytest.raises(ModelError, match="no model directory") as caught:
        resolve_base("data/tiny-bse")
    assert "`data/tiny-base`?" in (caught.value.hint or "")

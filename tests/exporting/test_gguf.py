"""GGUF files: every method against other implementations, and what must never get a name."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconMambaConfig, FalconMambaForCausalLM
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import ExportError, MambaSFTError, ModelError, UsageError
from mamba_sft.exporting import request
from mamba_sft.exporting.export_run import export as export_run
from mamba_sft.exporting.full_model import FullModel, find_model
from mamba_sft.exporting.gguf import files, metadata, verifying
from mamba_sft.exporting.gguf.files import prepare_files
from mamba_sft.exporting.gguf.importance import importance_matrix
from mamba_sft.exporting.gguf.metadata import read_vocabulary
from mamba_sft.exporting.gguf.probe import Job, run_probe
from mamba_sft.exporting.gguf.tensors import epsilon_scale, export_tensors
from mamba_sft.exporting.gguf.timing import writing_seconds
from mamba_sft.exporting.gguf.types import METHODS, choose_methods
from mamba_sft.exporting.gguf.verifying import compare_logits
from mamba_sft.exporting.gguf.writing import lay_out_file
from mamba_sft.exporting.logits import logits_of
from mamba_sft.exporting.request import GGUFOptions
from mamba_sft.llama_cpp import installed
from mamba_sft.llama_cpp import library as llama_cpp
from mamba_sft.merging.merge_run import merge
from mamba_sft.model.portable import plain_template
from mamba_sft.model.tensor_files import StoredTensors
from mamba_sft.model.tensor_headers import TensorEntry
from tests.conftest import SHARED_FALCON, build_model, build_tokenizer
from tests.merging.test_merge_run import make_run

TINY_BASE = Path(__file__).parents[2] / "data" / "tiny-base"
GOLDEN = Path(__file__).parent / "golden" / "llama_cpp_converter.json"
# The published table of falcon-mamba-7b GGUF files; its unit is 2**30 bytes.
PUBLISHED = {
    "Q2_K": 2.39, "IQ3_XS": 3.05, "IQ3_S": 3.05, "IQ3_M": 3.05, "Q3_K_S": 3.05, "Q3_K": 3.05, "Q3_K_M": 3.05,
    "Q3_K_L": 3.05, "IQ4_XS": 3.71, "IQ4_NL": 3.92, "Q4_0": 3.92, "Q4_1": 4.32, "Q4_K_S": 3.92, "Q4_K": 3.92,
    "Q4_K_M": 3.92, "Q5_0": 4.73, "Q5_1": 5.14, "Q5_K_S": 4.73, "Q5_K": 4.73, "Q5_K_M": 4.73, "Q6_K": 5.59,
    "Q8_0": 7.23,
}  # fmt: skip
UNVERIFIED = GGUFOptions(verify=False)
WINDOW = [14, 300, 41, 7, 88, 123, 250, 9, 10, 33, 400, 2, 17, 5, 99, 64]


def export(run: Any, **wanted: Any) -> list[request.GGUFFile]:
    return export_run(run, **wanted).files


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="300KB")
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 values, as the real model's widths are multiples of: every method keeps its own type."""
    model = build_model(hidden_size=256, num_hidden_layers=1, time_step_rank=256)
    return save(model, tmp_path_factory.mktemp("wide") / "model")


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tuple(int(n) for n in tensor.shape), tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }


def metadata_of(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields.items()
    return {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}


def seven_billion() -> FullModel:
    """The real model's shapes and none of its weights."""
    config = FalconMambaConfig(
        hidden_size=4096, intermediate_size=8192, num_hidden_layers=64, state_size=16, time_step_rank=256,
        vocab_size=65024, tie_word_embeddings=False, expand=16,
    )  # fmt: skip
    with torch.device("meta"):
        state = FalconMambaForCausalLM(config).state_dict()
    file = Path("nowhere.safetensors")
    entries = {n: TensorEntry(file, "BF16", tuple(t.shape), i, i) for i, (n, t) in enumerate(state.items())}
    model = FullModel("falcon-mamba-7b-instruct", config.to_dict(), StoredTensors(entries), SHARED_FALCON)
    model.__dict__["tied"] = False  # there are no weights to compare
    return model


def test_sizes_of_the_real_shape_are_the_published_ones(falcon_tokenizer: Any, tmp_path: Path) -> None:
    model = seven_billion()
    plan = prepare_files(model, choose_methods(["all"]), tmp_path, model.name, UNVERIFIED)
    assert [file.path.name for file in plan.files] == [
        f"falcon-mamba-7b-instruct.{name}.gguf" for name in PUBLISHED
    ]
    assert {file.method: round(file.nbytes / 2**30, 2) for file in plan.files} == PUBLISHED
    assert sum(torch.Size(t.shape).numel() for t in plan.tensors) == 7_272_665_088
    assert len({file.payload for file in plan.layouts}) == 13
    assert not list(tmp_path.iterdir())


def test_tensor_bytes_of_the_real_shape_need_no_tokenizer() -> None:
    model = seven_billion()
    tensors = export_tensors(model.shapes, model.config, tied=False)
    header = 2_410_000  # a vocabulary of 65,024 tokens and its merges
    sizes = {n: round((lay_out_file(METHODS[n], tensors).nbytes + header) / 2**30, 2) for n in PUBLISHED}
    assert sizes == PUBLISHED


def test_tensors_and_metadata_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["files"]
    options = GGUFOptions(fix_epsilon=False, verify=False)
    files = export(TINY_BASE, quantization=list(golden), output=tmp_path, options=options)
    stored = {k: v for part in TINY_BASE.glob("*.safetensors") for k, v in load_file(part).items()}
    a_log = {f"blk.{i}.ssm_a": stored[f"backbone.layers.{i}.mixer.A_log"] for i in range(4)}
    for file in files:
        expected = golden[file.method.lower()]
        tensors = tensors_of(file.path)
        found = {name: [kind, list(shape), sha(data)] for name, (kind, shape, data) in tensors.items()}
        for name in [name for name in found if name.endswith(".ssm_a")]:
            # torch's exp may differ in the last bit from one processor to the next, the converter's too
            assert found.pop(name)[:2] == expected["tensors"].pop(name)[:2]
            exact = -np.exp(a_log[name].double().numpy())
            off = np.frombuffer(tensors[name][2], np.float32).reshape(exact.shape) / exact - 1
            assert np.abs(off).max() < 2**-22
        assert found == expected["tensors"]
        metadata = {
            key: {"length": len(v), "sha256": sha(json.dumps(v).encode())}
            if isinstance(v, list) and len(v) > 8
            else v
            for key, v in metadata_of(file.path).items()
        }
        assert metadata.pop("general.name") == "tiny-base"  # as asked for; the converter makes a title of it
        assert expected["metadata"].pop("general.name") == "Tiny Base"
        for kind in ("bos", "eos"):  # what llama.cpp takes for granted, said
            assert metadata.pop(f"tokenizer.ggml.add_{kind}_token") is False
        assert metadata == expected["metadata"]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("shape", ["wide", "narrow", "tied"])
def test_every_method_equals_llama_cpps_own_quantizer(tmp_path: Path, wide: Path, shape: str) -> None:
    """cyllama carries another build of llama.cpp, whose quantizer reads a whole float file."""
    cyllama = pytest.importorskip("cyllama.llama.llama_cpp")
    source = wide
    if shape == "narrow":  # rows that are no multiple of 256, or of 32
        source = save(build_model(time_step_rank=32), tmp_path / "model")
    elif shape == "tied":
        sizes = {"hidden_size": 256, "num_hidden_layers": 1, "time_step_rank": 256}
        source = save(build_model(**sizes, tie_word_embeddings=True), tmp_path / "model")
    files = export(
        source, quantization=["all", "f32"], output=tmp_path / "ours", name="m", options=UNVERIFIED
    )
    assert len(files) == 23
    cyllama.disable_logging()
    for file in files[:-1]:
        theirs = tmp_path / "theirs.gguf"
        params = cyllama.LlamaModelQuantizeParams()
        params.ftype = int(METHODS[file.method].file_type)
        params.nthread = 1
        cyllama.model_quantize(str(files[-1].path), str(theirs), params)
        ours, wanted = tensors_of(file.path), tensors_of(theirs)
        assert ours.keys() == wanted.keys()
        for name in wanted:
            assert ours[name] == wanted[name], f"{file.method} {name}: {ours[name][:2]} {wanted[name][:2]}"
        assert metadata_of(file.path) == metadata_of(theirs)
        assert file.path.stat().st_size == file.nbytes


def test_a_float32_file_holds_the_checkpoints_values(tmp_path: Path) -> None:
    base = save(build_model(), tmp_path / "model")
    (file,) = export(base, quantization="f32", output=tmp_path / "out", options=UNVERIFIED)
    state = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    read = {t.name: dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape][::-1])
            for t in GGUFReader(file.path).tensors}  # fmt: skip
    layer, block = "backbone.layers.1.mixer.", "blk.1."
    assert np.array_equal(read[block + "ssm_in.weight"], state[layer + "in_proj.weight"])
    assert np.array_equal(read[block + "ssm_conv1d.weight"], state[layer + "conv1d.weight"].squeeze(1))
    assert np.array_equal(read[block + "ssm_a"], -torch.exp(state[layer + "A_log"]))
    scaled = state[layer + "x_proj.weight"] * 10**0.5
    np.testing.assert_allclose(read[block + "ssm_x.weight"], scaled, rtol=1e-6)
    assert np.array_equal(read["output.weight"], state["lm_head.weight"])
    assert len(read) == len(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_adapter_give_the_very_file_of_the_merged_checkpoint(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    rows = len(build_tokenizer())  # none to spare: the vocabulary grows
    made = make_run(tmp_path, base_dtype=dtype, config={"vocab_size": rows}, chat={"special_tokens": "add"})
    methods = ["Q4_K_M", "f32"]
    summed = export(made.run, quantization=methods, options=UNVERIFIED)
    direct = [file.path.read_bytes() for file in summed]
    merge(made.run)
    assert find_model(made.run).directory == made.run.merged
    assert [
        file.path.read_bytes() for file in export(made.run, quantization=methods, options=UNVERIFIED)
    ] == direct
    assert [file.path.name for file in summed] == ["run.Q4_K_M.gguf", "run.F32.gguf"]


def test_the_epsilon_fix_makes_llama_cpp_compute_the_same(tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.x_proj.weight.mul_(0.005)  # so small that an epsilon counts
    base = save(model, tmp_path / "model")
    reference = logits_of(find_model(base), [WINDOW])
    differences = {}
    for fixed in (True, False):
        options = GGUFOptions(fix_epsilon=fixed, verify=False)
        (file,) = export(base, quantization="f32", output=tmp_path / str(fixed), options=options)
        seen = run_probe(Job(str(file.path), [], [WINDOW], [], 0))
        differences[fixed] = np.abs(seen.logits[0] - reference[0].numpy()).max()
    assert differences[True] < 1e-4
    assert differences[False] > 100 * differences[True]
    assert epsilon_scale({}) == pytest.approx(10**0.5)


def test_the_walk_over_the_layers_gives_transformers_logits(tmp_path: Path) -> None:
    model = build_model()
    base = save(model, tmp_path / "model")
    found = logits_of(find_model(base), [WINDOW, WINDOW[:3]])
    with torch.no_grad():
        for window, logits in zip([WINDOW, WINDOW[:3]], found, strict=True):
            torch.testing.assert_close(logits, model(torch.tensor([window])).logits[0], rtol=1e-5, atol=1e-5)


def test_an_importance_matrix_is_the_mean_square_of_every_projections_inputs(tmp_path: Path) -> None:
    model = build_model()
    base = save(model, tmp_path / "model")
    found = importance_matrix(find_model(base), [WINDOW, WINDOW[::-1]])
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs: seen.setdefault(name, []).append(
            inputs[0].reshape(-1, inputs[0].shape[-1])
        )

    for i, block in enumerate(model.backbone.layers):
        for leaf, short in (("in_proj", "in"), ("x_proj", "x"), ("out_proj", "out")):
            getattr(block.mixer, leaf).register_forward_pre_hook(keep(f"blk.{i}.ssm_{short}.weight"))
        block.mixer.dt_layernorm.register_forward_hook(
            lambda module, inputs, output, i=i: seen.setdefault(f"blk.{i}.ssm_dt.weight", []).append(
                output[0]
            )
        )
    model.lm_head.register_forward_pre_hook(keep("output.weight"))
    with torch.no_grad():
        for window in (WINDOW, WINDOW[::-1]):
            model(torch.tensor([window]))
    assert found.keys() == seen.keys()
    for name, rows in seen.items():
        np.testing.assert_allclose(found[name], torch.cat(rows).square().mean(0), rtol=1e-4)


def test_an_importance_matrix_is_used(wide: Path, tmp_path: Path) -> None:
    model = find_model(wide)
    options = GGUFOptions(verify=False, imatrix=True, imatrix_tokens=64)
    (weighed,) = export(wide, quantization="Q2_K", output=tmp_path / "weighed", options=options)
    (plain,) = export(wide, quantization="Q2_K", output=tmp_path / "plain", options=UNVERIFIED)
    importance = importance_matrix(model, files.calibration_text(model, 64).windows)
    left, right = tensors_of(weighed.path), tensors_of(plain.path)
    name = "blk.0.ssm_in.weight"
    rows = model.tensors.whole("backbone.layers.0.mixer.in_proj.weight").numpy()
    assert left[name][2] == llama_cpp.quantize(METHODS["Q2_K"].base, rows, importance[name]).tobytes()
    assert left[name] != right[name]
    assert left["token_embd.weight"] == right["token_embd.weight"]  # looked up, not multiplied with
    recorded = json.loads((tmp_path / "weighed" / "quality.json").read_text())["files"]
    assert "64 tokens" in recorded["model.Q2_K.gguf"]["imatrix"]


def test_quality_is_measured_and_stored(wide: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    files = export(
        wide,
        quantization=["f32", "Q8_0", "Q4_K_S", "Q4_K_M"],
        output=tmp_path,
        progress=lambda *c: calls.append(c),
    )
    quality = {file.method: file.quality for file in files}
    assert quality["F32"] is not None
    assert quality["F32"].kl < 1e-9 and quality["F32"].top1 == 1.0  # noqa: PT018
    assert quality["F32"].same_tokens == quality["F32"].answer_tokens > 0
    assert quality["F32"].kl < quality["Q8_0"].kl < quality["Q4_K_M"].kl  # type: ignore[union-attr]
    assert quality["Q4_K_M"] == quality["Q4_K_S"]
    stored = json.loads((tmp_path / "quality.json").read_text())["files"]
    assert stored["model.Q8_0.gguf"]["kl"] == quality["Q8_0"].kl  # type: ignore[union-attr]
    assert {stage for stage, _, _ in calls} == {"reference", "writing", "verifying"}
    writing = [(done, total) for stage, done, total in calls if stage == "writing"]
    assert writing[-1] == (sum(torch.Size(s).numel() for s in find_model(wide).shapes.values()),) * 2
    assert writing == sorted(writing)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["quality.json", *(file.path.name for file in files)]
    )
    (tmp_path / "model.Q8_0.gguf").unlink()
    export(wide, quantization="Q5_0", output=tmp_path, options=UNVERIFIED)
    stored = json.loads((tmp_path / "quality.json").read_text())["files"]
    assert "model.Q8_0.gguf" not in stored
    assert stored["model.Q5_0.gguf"]["verified"] is False


def without_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GGUFWriter, "add_ssm_dt_b_c_rms", lambda self, value: None)


def wrong_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_pre_tokenizer", lambda content, path: "gpt-2")


def too_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    read = metadata.read_vocabulary

    def shortened(model: FullModel) -> Any:
        vocabulary = read(model)
        del vocabulary.tokens[-1], vocabulary.types[-1]
        return vocabulary

    monkeypatch.setattr(files, "read_vocabulary", shortened)


def log_of_a(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_sft.exporting.gguf.tensors import ExportTensor

    monkeypatch.setattr(
        ExportTensor, "transform", lambda self, rows: rows.float().reshape(len(rows), *self.shape[1:])
    )


TRAPS = {
    "norms of dt, B, C left out": (without_norms, "is not the model"),
    "another pre-tokenizer": (wrong_tokenizer, "into other tokens"),
    "fewer tokens than rows": (too_few_tokens, "llama.cpp cannot use"),
    "A_log instead of A": (log_of_a, "is not the model"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_file_that_fails_its_check_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    base = save(build_model(), tmp_path / "model")
    output = tmp_path / "out"
    (earlier,) = export(base, quantization="f32", output=output, options=UNVERIFIED)
    before = earlier.path.read_bytes()
    spring, message = TRAPS[trap]
    spring(monkeypatch)
    with pytest.raises(ExportError, match=message):
        export(base, quantization="f32", output=output)
    assert sorted(path.name for path in output.iterdir()) == ["model.F32.gguf", "quality.json"]
    assert earlier.path.read_bytes() == before


def test_kl_and_agreement_of_known_logits() -> None:
    left = torch.tensor([[0.0, np.log(3.0)], [2.0, 0.0]])
    right = np.array([[0.0, 0.0], [5.0, 5.0 - 2.0]], np.float32)
    kl, top1 = compare_logits([left], [right])
    p = torch.tensor([0.25, 0.75])
    assert kl == pytest.approx(((p * (p / 0.5).log()).sum() / 2).item())
    assert top1 == 0.5


def test_the_vocabulary_survives_every_spelling(tmp_path: Path) -> None:
    """Rows without tokens, merges as pairs or strings, stop ids as a list, the template in a file or not."""
    model = build_model(vocab_size=520, expand=16, intermediate_size=128)
    base = save(model, tmp_path / "model")
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in tokenizer["model"]["merges"]]
    tokens = len(build_tokenizer())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = []
    for spelling in (pairs, [" ".join(pair) for pair in pairs]):
        tokenizer["model"]["merges"] = spelling
        (base / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        (base / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((base / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        if spelling is pairs:
            (base / "chat_template.jinja").write_text(template)
        else:
            config["chat_template"] = template
        (base / "tokenizer_config.json").write_text(json.dumps(config))
        settings = json.loads((base / "config.json").read_text()) | {"eos_token_id": [11, 10]}
        (base / "config.json").write_text(json.dumps(settings))
        found.append(read_vocabulary(find_model(base)))
    assert found[0] == found[1]
    assert found[0].template == template
    assert len(found[0].tokens) == 520
    assert found[0].tokens[tokens:] == [f"[PAD{i}]" for i in range(tokens, 520)]
    assert {int(kind) for kind in found[0].types[tokens:]} == {5}
    assert found[0].ids["eos"] == 11
    (file,) = export(base, quantization="f16", output=tmp_path / "out")
    assert metadata_of(file.path)["mamba.ssm.inner_size"] == 128


def test_marks_for_training_leave_the_template_and_nothing_else(tmp_path: Path) -> None:
    from jinja2 import Environment

    made = make_run(tmp_path)
    model = find_model(made.run)
    chats = [
        [{"role": "user", "content": "  a\n"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": " b "},
            {"role": "user", "content": "<|im_end|>"},
        ],
    ]
    vocabulary = read_vocabulary(model)
    assert vocabulary.template is not None
    assert "generation %}" not in vocabulary.template
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(vocabulary.template)
    for chat in chats:
        for opened in (True, False):
            wanted = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
            assert plain.render(messages=chat, add_generation_prompt=opened) == wanted
    assert plain_template(None) is None


def test_what_cannot_be_exported_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(build_model(), tmp_path / "model")
    with pytest.raises(UsageError, match="no quantization `Q9`"):
        export(base, quantization="Q9", output=tmp_path / "out")
    with pytest.raises(UsageError, match="no format"):
        export(base, format="onnx", output=tmp_path / "out")
    with pytest.raises(UsageError, match="where to"):
        export(base)
    with pytest.raises(UsageError, match="what would be exported"):
        export(base, output=base)
    wide_inner = save(build_model(intermediate_size=256, expand=4), tmp_path / "inner")
    with pytest.raises(ModelError, match="twice the hidden size"):
        export(wide_inner, output=tmp_path / "out")
    biased = save(build_model(use_bias=True), tmp_path / "biased")
    with pytest.raises(ModelError, match="no place"):
        export(biased, output=tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 << 20})())
    with pytest.raises(ExportError, match=r"take 66\.\d MiB"):
        export(base, quantization="all", output=tmp_path / "out")
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    llama_cpp.load.cache_clear()
    with pytest.raises(MambaSFTError, match="needs `gguf`") as caught:
        export(base, output=tmp_path / "out")
    assert "mamba-sft[gguf]" in str(caught.value.hint)
    monkeypatch.undo()
    llama_cpp.load.cache_clear()
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_quantized_whole_are_an_error() -> None:
    library = SimpleNamespace(
        ggml_row_size=lambda kind, columns: 34, ggml_quantize_chunk=lambda kind, rows, packed, *rest: 34
    )
    with pytest.raises(MambaSFTError, match="wrote 34 bytes of Q8_0 where 68 belong") as caught:
        llama_cpp._quantize(library, GGMLQuantizationType.Q8_0, np.ones((2, 32), np.float32), None)
    assert "mamba-sft[gguf]" in str(caught.value.hint)


def test_inputs_of_a_tensor_that_gguf_has_not_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find_model(save(build_model(), tmp_path / "model"))
    monkeypatch.setattr("mamba_sft.exporting.gguf.importance.gguf_name", lambda name: None)
    with pytest.raises(ModelError, match=r"in_proj\.weight` has no place in a GGUF file"):
        importance_matrix(model, [[1, 2, 3]])


def test_greedy_answers_are_compared_up_to_the_first_difference(tmp_path: Path) -> None:
    base = save(build_model(), tmp_path / "model")
    verifier = verifying.Verifier(find_model(base))
    with torch.no_grad():
        ids = list(verifier.prompt)
        for _ in range(4):
            ids.append(int(build_model()(torch.tensor([ids])).logits[0, -1].argmax()))
    own = ids[len(verifier.prompt) :]
    other = [*own[:2], (own[2] + 1) % 512, own[3]]
    quality = request.Quality(0.0, 1.0, 1, 1, "", 4, 0)
    found = verifier.compare_answers([(quality, own), (quality, other)])
    assert [one.same_tokens for one in found] == [4, 2]


LOADING = """
import sys
from pathlib import Path
from mamba_sft.llama_cpp import library as llama_cpp
if sys.argv[2] == "copied":
    llama_cpp._keep_weights_mapped = lambda library: None
library = llama_cpp.load()
keep = llama_cpp._LOG_CALLBACK(lambda level, text, data: sys.stdout.write(text.decode()))
library.llama_log_set(keep, None)
llama_cpp.LoadedModel(library, Path(sys.argv[1]), 1).close()
"""


def test_llama_cpp_uses_weights_as_they_lie_in_the_file(tmp_path: Path, wide: Path) -> None:
    export(wide, quantization="Q4_0", output=tmp_path, options=GGUFOptions(verify=False))
    seen = {}
    for how in ("copied", "mapped"):
        command = [sys.executable, "-c", LOADING, str(next(tmp_path.glob("*.gguf"))), how]
        seen[how] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "REPACK" not in seen["copied"]:
        pytest.skip("llama.cpp rearranges nothing on this processor")
    assert "REPACK" not in seen["mapped"]


def test_the_probe_starts_without_torch() -> None:
    code = (
        "import sys, mamba_sft.exporting.gguf.probe; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_time_grows_with_the_work(tmp_path: Path, wide: Path) -> None:
    model = find_model(wide)
    plans = [
        prepare_files(model, choose_methods([name]), tmp_path, "m", UNVERIFIED) for name in ("Q8_0", "all")
    ]
    one, all_of_them = (writing_seconds(plan) for plan in plans)
    assert all_of_them > 2 * one  # some fifty times, so no pause of the machine turns it round


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(build_model(), tmp_path / "model")
    output = tmp_path / "out"
    command = ["export", str(base), "--output", str(output), "-q", "Q8_0", "-q", "f16"]
    planned = CliRunner().invoke(app, [*command, "--dry-run", "--json"], catch_exceptions=False)
    plan = json.loads(planned.stdout)
    assert not output.exists()
    assert plan["seconds"] > 0
    assert plan["check_seconds"] > 0
    unchecked = CliRunner().invoke(app, [*command, "--dry-run", "--json", "--no-verify"])
    assert json.loads(unchecked.stdout)["check_seconds"] is None
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    files = json.loads(done.stdout)["files"]
    assert [file["nbytes"] for file in plan["files"]] == [file["nbytes"] for file in files]
    assert [Path(file["path"]).stat().st_size for file in files] == [file["nbytes"] for file in files]
    assert all(file["quality"]["top1"] > 0.9 for file in files)
    shown = CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False)
    assert "model.Q8_0.gguf" in shown.stdout
    assert "of disk in" in shown.stdout
    assert "to check on this machine" in shown.stdout
    listed = CliRunner().invoke(app, [*command, "--no-verify"], catch_exceptions=False)
    assert listed.stdout.splitlines() == [str(output / "model.Q8_0.gguf"), str(output / "model.F16.gguf")]
    for wrong in (["-q", "Q9"], ["--format", "onnx"], ["--format", "hf", "--dry-run"]):
        failed = CliRunner().invoke(app, ["export", str(base), "--output", str(output), *wrong])
        assert isinstance(failed.exception, UsageError)
        assert failed.exception.exit_code == 2

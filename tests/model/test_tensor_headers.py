"""Headers and indexes that anybody may have written: tensors that are there, or one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mamba_sft.errors import ModelError
from mamba_sft.model.checkpoint import INDEX_NAME, base_fingerprint, read_config, read_tensors
from mamba_sft.model.shape import Shape
from mamba_sft.model.tensor_headers import read_header

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_file_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    saved = {str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in dtypes}
    save_file(saved | {"none": torch.zeros(0, 5), "scalar": torch.tensor(1.0)}, path, metadata={"a": "b"})
    found = read_header(path)
    assert {name: entry.shape for name, entry in found.items()} == dict.fromkeys(saved, (3, 2)) | {
        "none": (0, 5),
        "scalar": (),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [10**9]}, "does not fit its 8 bytes"),
        ({"shape": [10**30]}, "has the shape"),
        ({"shape": [-1]}, r"has the shape \[-1\]"),
        ({"shape": [-1, -2]}, "has the shape"),
        ({"shape": "ab"}, "has the shape 'ab'"),
        ({"shape": ["a"]}, "has the shape"),
        ({"shape": [2.0]}, "has the shape"),
        ({"shape": [True, 2]}, "has the shape"),
        ({"shape": [1] * 65 + [2]}, "has the shape"),
        ({"shape": None}, "has the shape"),
        ({"dtype": "F33"}, "unknown dtype 'F33'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"dtype": None}, "unknown dtype"),
        ({"dtype": "F16"}, "does not fit"),
        ({"data_offsets": [-8, 0]}, "has the data offsets"),
        ({"data_offsets": [0.5, 8.5]}, "has the data offsets"),
        ({"data_offsets": [8, 0]}, "has the data offsets"),
        ({"data_offsets": [0]}, "has the data offsets"),
        ({"data_offsets": "ab"}, "has the data offsets"),
        ({"data_offsets": {"0": 1, "8": 2}}, "has the data offsets"),
        ({"data_offsets": [0, 16], "shape": [4]}, "is truncated"),
        ({"data_offsets": [4, 8], "shape": [1]}, "lies behind bytes of no tensor"),
        ({"data_offsets": [0, 4], "shape": [1]}, "behind its last tensor belong to none"),
        ({"more": 1}, "is not a dtype, a shape"),
    ],
)
def test_odd_values_of_a_tensor(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = file_of(tmp_path / "x.safetensors", {"x": GOOD | change})
    with pytest.raises(ModelError, match=message) as found:
        read_header(path)
    assert len(found.value.message) < 600


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "header cannot be read"),
        (3, "header cannot be read"),
        ("ab", "header cannot be read"),
        (None, "header cannot be read"),
        (b"[" * 100_000, "header cannot be read"),
        (b'{"x":' * 100_000, "header cannot be read"),
        (b'{"x": ' + b"9" * 5000 + b"}", "header cannot be read"),
        (json.dumps({"x": GOOD}).encode()[:-1] + b',"x": 1}', "header cannot be read"),
        (b"\xff\xfe", "header cannot be read"),
        ({"x": 3}, "is not a dtype, a shape"),
        ({"x": None}, "is not a dtype, a shape"),
        ({"x": [1, 2]}, "is not a dtype, a shape"),
        ({"\ud800": GOOD}, "has a name that cannot be shown"),
        ({"\x1b[2J": GOOD}, "has a name that cannot be shown"),
        ({"x": GOOD, "y": GOOD}, "tensor `y` overlaps the one before"),
    ],
)
def test_odd_headers(tmp_path: Path, header: Any, message: str) -> None:
    path = file_of(tmp_path / "x.safetensors", header)
    with pytest.raises(ModelError, match=message):
        read_header(path)


def test_a_length_beyond_the_file_and_beyond_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in (100, 1 << 62, (1 << 64) - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ModelError, match="header cannot be read"):
            read_header(path)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 400)):
        with pytest.raises(ModelError, match="cannot read"):
            read_header(path)


numbers = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.booleans(), st.text(max_size=3))
values = st.recursive(
    st.none() | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
offsets = st.lists(st.integers(0, 5).map(lambda i: 4 * i), min_size=2, max_size=2)
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F33"]) | values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | values,
        "data_offsets": offsets | values,
    }
)
headers = st.dictionaries(st.text(max_size=5), tensors | values, max_size=4) | values
odd_names = st.sampled_from(
    ["../x", "/etc/passwd", "a/b", "x" * 300, "", ".", "..", "x\0", "\\\\host\\x", "C:x"]
)


@given(header=headers, data=st.binary(max_size=24))
def test_any_header_gives_tensors_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    path = file_of(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", header, data)
    try:
        found = read_header(path)
    except ModelError:
        return
    with safe_open(path, "pt") as file:  # what we take, the library takes
        assert set(file.keys()) == set(found)
    for entry in found.values():
        assert 0 <= entry.start <= entry.end <= path.stat().st_size


@given(
    index=st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.text(max_size=3), odd_names | values) | values}
    )
)
def test_any_index_gives_tensors_or_one_message(tmp_path_factory: pytest.TempPathFactory, index: Any) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    directory.mkdir(exist_ok=True)
    (directory / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError):
        read_tensors(directory)


def test_deep_or_unreadable_indexes_and_configs(tmp_path: Path) -> None:
    for content in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b"3",
        b"[]",
        b"null",
        b'"x"',
        b"{" + b"9" * 5000,
    ):
        for name, read in ((INDEX_NAME, read_tensors), ("config.json", read_config)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ModelError):
                read(tmp_path)


@pytest.mark.parametrize("told", [["x"], "x", 3, {"quant_method": ["x"]}])
def test_odd_quantization_configs(tmp_path: Path, told: Any) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "falcon_mamba", "quantization_config": told})
    )
    with pytest.raises(ModelError, match="already quantized"):
        read_config(tmp_path)


@given(
    st.dictionaries(st.sampled_from(["hidden_size", "expand", "time_step_rank", "intermediate_size"]), values)
)
def test_any_sizes_give_a_shape_or_one_message(config: dict[str, Any]) -> None:
    try:
        shape = Shape.from_config(config)
    except ModelError:
        return
    assert shape.products > 0


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{tmp}/outside.safetensors", "sub/../../outside.safetensors"]
)
def test_a_shard_elsewhere_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    outside = file_of(tmp_path / "outside.safetensors", {"x": GOOD})
    index = {"weight_map": {"x": name.format(tmp=tmp_path)}}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    touched: list[str] = []
    for method in ("open", "stat", "is_file"):
        real = getattr(Path, method)

        def watched(self: Path, *args: Any, real: Any = real, **how: Any) -> Any:
            touched.append(self.name)
            return real(self, *args, **how)

        monkeypatch.setattr(Path, method, watched)
    with pytest.raises(ModelError, match="no name of a file beside it"):
        read_tensors(directory)
    assert INDEX_NAME in touched
    assert outside.name not in touched


def test_a_link_is_a_file_of_its_directory(tmp_path: Path) -> None:
    blob = file_of(tmp_path / "blob", {"x": GOOD})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(blob)  # as the hub's cache has it
    assert set(read_tensors(tmp_path / "model")) == {"x"}


def test_no_pickle_is_opened(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    for name in ("pytorch_model.bin", "model.safetensors.bin", "training_args.bin"):
        (tiny_base / name).write_bytes(pickle.dumps({"x": 1}))

    def refuse(*args: Any, **how: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(place, refuse)
    before = base_fingerprint(tiny_base)
    (tiny_base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles"):
        base_fingerprint(tiny_base)
    (tiny_base / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_tensors(tiny_base)
    assert before


def test_the_library_refuses_what_we_refuse(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.safetensors", {"x": GOOD, "y": GOOD})
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass

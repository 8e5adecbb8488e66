"""What the pages on exporting and serving say that a program can check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.exporting.gguf.names import FLOATS, QUANTIZED

ROOT = Path(__file__).parents[2]
EXPORT, SERVING = ROOT / "docs/export.md", ROOT / "docs/serving.md"
HEADER = 2_410_000
"""Bytes of the 7B's header: 65,024 tokens and their merges."""


def shapes_of_the_7b() -> dict[str, tuple[int, ...]]:
    rows, width, inner, states, rank, kernel = 65024, 4096, 8192, 16, 256, 4
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.weight": (rows, width),
        "backbone.norm_f.weight": (width,),
        "lm_head.weight": (rows, width),
    }
    for layer in range(64):
        shapes |= {
            f"backbone.layers.{layer}.{name}": shape
            for name, shape in {
                "norm.weight": (width,),
                "mixer.A_log": (inner, states),
                "mixer.D": (inner,),
                "mixer.conv1d.weight": (inner, 1, kernel),
                "mixer.conv1d.bias": (inner,),
                "mixer.in_proj.weight": (2 * inner, width),
                "mixer.x_proj.weight": (rank + 2 * states, inner),
                "mixer.dt_proj.weight": (inner, rank),
                "mixer.dt_proj.bias": (inner,),
                "mixer.out_proj.weight": (width, inner),
            }.items()
        }
    return shapes


def test_the_table_of_quantizations_has_all_of_them_in_their_sizes() -> None:
    pytest.importorskip("xllamacpp")
    from mamba_sft.exporting.gguf.tensors import export_tensors
    from mamba_sft.exporting.gguf.types import METHODS
    from mamba_sft.exporting.gguf.writing import lay_out_file

    tensors = export_tensors(shapes_of_the_7b(), {}, tied=False, fix_epsilon=True)
    values = sum(tensor.values for tensor in tensors)
    assert values == 7_272_665_088
    page = EXPORT.read_text(encoding="utf-8")
    named = []
    for names, size, bits in re.findall(r"^\| (`.*`) \| ([\d.]+) GiB \| ([\d.]+) \|$", page, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            nbytes = lay_out_file(METHODS[name], tensors).nbytes
            assert f"{(nbytes + HEADER) / 2**30:.2f}" == size, name
            assert f"{nbytes * 8 / values:.2f}" == bits, name
            named.append(name)
    assert sorted(named) == sorted((*QUANTIZED, *FLOATS))
    assert f"all {len(QUANTIZED)}." in page
    whole = sum(lay_out_file(METHODS[name], tensors).nbytes for name in QUANTIZED)
    assert f"{whole / 2**30:.0f} GiB of disk" in page


class OptionsTakenError(Exception):
    """What a command comes to when its options were read."""


@pytest.mark.parametrize("page", [EXPORT, SERVING], ids=lambda path: path.stem)
def test_the_commands_of_the_pages_are_ours(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*words: Any, **more: Any) -> None:
        raise OptionsTakenError

    monkeypatch.setattr("mamba_sft.exporting.export_run.check_request", taken)
    monkeypatch.setattr("mamba_sft.merging.request.check_request", taken)
    monkeypatch.setattr("mamba_sft.cli.merge.run_or_newest", lambda run: run)
    lines = re.findall(r"^mamba-sft ([^#\n]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        result = CliRunner().invoke(app, line.split())
        assert isinstance(result.exception, OptionsTakenError), result.output

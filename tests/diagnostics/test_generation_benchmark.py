"""`bench generate`: what it times, what it leaves out and says so, and how it is drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.cli.bench_generate import numbers, rendered
from mamba_sft.cli.length_plot import svg_plots, terminal_plots
from mamba_sft.diagnostics import generation_benchmark, generation_steps
from mamba_sft.diagnostics.generation_benchmark import measure_generation
from mamba_sft.diagnostics.measured_process import NoMemoryError, TooLongError
from mamba_sft.errors import ModelError, UsageError
from mamba_sft.inference.model_places import find_place


def test_numbers_are_read_with_k() -> None:
    assert numbers("4k, 1K,100,1k", "--lengths", 10_000) == [100, 1024, 4096]


@pytest.mark.parametrize("text", ["", "1k,", "0", "-1", "1.5k", "2m", "100k", "x"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="`--lengths"):
        numbers(text, "--lengths", 10_000)


def test_both_sides_time_the_same_prompts(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told_by(measure: Any, *arguments: Any, what: str, seconds: float | None = None) -> list[Any]:
        found: list[Any] = []
        measure(found.append, *arguments)
        return found

    monkeypatch.setattr(generation_benchmark, "told_by", told_by)
    monkeypatch.setattr(generation_steps, "PREFILL_CHUNK", 16)  # read in several chunks
    found = measure_generation(find_place(str(tiny_base)), lengths=[40, 8], batch_sizes=[2, 1], new_tokens=3)
    assert json.loads(json.dumps(found)) == found
    rows = [(row["of"], row["batch_size"], row["length"]) for row in found["rows"]]
    sizes = [(1, 8), (1, 40), (2, 8), (2, 40)]
    assert rows == [(side, *one) for side in ("mamba-sft", "transformers") for one in sizes]
    for row in found["rows"]:
        size, length = row["batch_size"], row["length"]
        assert row["prefill_tokens_per_second"] == size * length / row["prefill_seconds"]
        assert row["decode_tokens_per_second"] == size * 3 / row["decode_seconds"]
        assert row["peak_bytes"] > 0
    assert [one["batch_size"] for one in found["flat"]] == [1, 2]
    assert found["settings"]["dtype"] == "float32"
    assert [one["length"] for one in found["against_peer"]] == [40, 40]
    assert found["peer_ended"] is None
    assert not found["peer_is_base"]


def test_stock_does_not_try_what_would_take_all_memory(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(generation_steps, "_forget_peak", lambda device: 0)
    told: list[Any] = []
    generation_steps.time_stock(told.append, str(tiny_base), [1], [8, 64, 128], 2, "float32")
    assert [fact.get("length") for fact in told] == [None, 8, 64]
    assert told[-1]["left_out"].startswith("at 64 tokens it would take some ")


@pytest.mark.parametrize(
    ("error", "text"),
    [(TooLongError, "stopped after 8 tokens: 3.0 s were over"), (NoMemoryError, "out of memory")],
)
def test_where_stock_ended_is_said(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], text: str
) -> None:
    def told_by(measure: Any, *arguments: Any, **more: Any) -> Any:
        yield {"dtype": "float32"}
        yield fact(8)
        if measure is generation_steps.time_stock:
            raise error
        yield fact(64)

    monkeypatch.setattr(generation_benchmark, "told_by", told_by)
    found = measure_generation(find_place(str(tiny_base)), lengths=[8, 64], peer_seconds=3.0)
    assert found["peer_ended"] == text
    assert f"transformers: {text}" in [str(part) for part in rendered(found)]


def fact(length: int, seconds: float = 1.0, peak: int = 1 << 30) -> dict[str, Any]:
    clocks = ("prefill_seconds", "decode_seconds", "prefill_cpu_seconds", "decode_cpu_seconds")
    return {"batch_size": 1, "length": length, "peak_bytes": peak} | dict.fromkeys(clocks, seconds)


def result() -> dict[str, Any]:
    rows = [
        {"of": "mamba-sft"} | generation_benchmark.with_rates(fact(length, length / 1000), 32)
        for length in (1024, 8192, 131_072)
    ]
    rows.append({"of": "transformers"} | generation_benchmark.with_rates(fact(1024, 50.0, 3 << 30), 32))
    return {
        "machine": {"cpu": "a processor"}, "rows": rows, "peer_ended": None, "peer_is_base": True,
        "settings": {
            "model": "x", "dtype": "float32", "lengths": [1024, 8192, 131_072], "batch_sizes": [1],
            "new_tokens": 32,
        },
        "flat": [generation_benchmark._flatness(rows[:3], 1)],
        "against_peer": [generation_benchmark._against(rows[:3], rows[3:], 1)],
    }  # fmt: skip


def test_the_plot_fits_a_terminal_and_has_every_point() -> None:
    lines = list(terminal_plots(result()))
    assert max(map(len, lines)) <= 80
    prefill = lines[1:10]
    assert prefill[0].strip() == "prefill, tokens/s (logarithmic): o mamba-sft, x transformers"
    assert prefill[1].count("o") == 3  # as fast at every length
    assert prefill[7].endswith("|x")
    assert lines[10].split() == ["1,024", "tokens", "of", "the", "prompt", "131k"]
    assert list(terminal_plots(result() | {"settings": result()["settings"] | {"lengths": [8]}})) == []


def test_every_curve_is_drawn_however_many_there_are() -> None:
    sizes = [2**number for number in range(30)]
    rows = [
        {
            "of": "mamba-sft", "batch_size": size, "length": length, "peak_bytes": size,
            "prefill_tokens_per_second": size * length, "decode_tokens_per_second": size,
        }
        for size in sizes
        for length in (8, 16)
    ]  # fmt: skip
    lines = list(terminal_plots({"settings": {"lengths": [8, 16], "batch_sizes": sizes}, "rows": rows}))
    assert lines[1].count("batch ") == len(sizes)


def test_the_picture_is_svg_with_all_three_panels() -> None:
    root = ET.fromstring(svg_plots(result()))
    panels = [child for child in root if child.tag.endswith("svg")]
    assert len(panels) == 3
    assert "prefill, tokens/s: mamba-sft" in svg_plots(result())


def test_what_is_flat_is_said_of_longest_and_shortest() -> None:
    lines = [str(part) for part in rendered(result())]
    assert (
        "batch 1, from 1,024 to 131,072 tokens: prefill 1.00 times as fast, decoding 0.01 times, "
        "memory 1.00 times" in lines
    )
    against = "batch 1, 1,024 tokens, against transformers: prefill 48.8 times as fast, decoding 48.8 times, "
    assert against + "memory 0.33 times" in lines
    assert "transformers: the base alone, without the adapter" in lines


def test_the_verb_writes_what_is_asked(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        generation_benchmark, "measure_generation", lambda *a, **k: calls.append(k) or result()
    )
    files = {"--plot": tmp_path / "p.svg", "--output": tmp_path / "r.json"}
    words = [word for pair in files.items() for word in map(str, pair)]
    asked = ["bench", "generate", str(tiny_base), "--lengths", "1k,2", "--no-peer", "--json", *words]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert calls[0]["lengths"] == [2, 1024]
    assert calls[0]["peer"] is False
    assert json.loads(shown.stdout) == json.loads(files["--output"].read_text())
    assert files["--plot"].read_text().startswith("<svg ")


@pytest.mark.parametrize("words", [["--plot", "p.png"], ["--output", "r.txt"], ["--lengths", "many"]])
def test_mistakes_are_told_before_anything_is_measured(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(generation_benchmark, "measure_generation", lambda *a, **k: pytest.fail("measured"))
    shown = CliRunner().invoke(app, ["bench", "generate", str(tiny_base), *words])
    assert isinstance(shown.exception, UsageError)


def test_a_model_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["bench", "generate", str(tmp_path / "none")])
    assert isinstance(shown.exception, ModelError)

"""The benchmark: what it measures and how it counts. How fast anything is, is not tested here."""

from __future__ import annotations

import io
import json
import logging
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mamba_sft import kernels
from mamba_sft.cli import app
from mamba_sft.cli.bench import rendered
from mamba_sft.diagnostics import bench_cpu, bench_gpu, gpu_limits, kernel_benchmark
from mamba_sft.diagnostics.bench_gpu import Case, RowShape, Target
from mamba_sft.diagnostics.gpu_limits import GpuLimits
from mamba_sft.errors import MambaSFTError, UsageError
from mamba_sft.planning.gpus import SCAN_BACKWARD, SCAN_FORWARD

CPU = torch.device("cpu")
H200 = GpuLimits("NVIDIA H200", (9, 0), 132, 1.83e9)
A100 = GpuLimits("NVIDIA A100", (8, 0), 108, 1.41e9)
T4 = GpuLimits("Tesla T4", (7, 5), 40, 1.4e9)
SMALL = [RowShape(1, 24, D=64, N=4), RowShape(2, 8, D=64, N=4)]
TOKEN = 64 * 8192 * 16  # state updates of one token in all layers of the 7B model


@pytest.fixture(autouse=True)
def forget_peers():
    bench_gpu.peer.cache_clear()
    yield
    bench_gpu.peer.cache_clear()


# --- the floor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "forward", "backward", "training"),
    [(H200, 2.7, 7.9, 13.3), (A100, 4.4, 15.6, 24.4), (T4, 11.9, 42.4, 66.2)],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_floor_is_the_pipe_that_takes_longest(card, forward, backward, training):
    """Microseconds per token, by hand from the counts.

    On the H200 special functions bind in the forward and issue in the backward, float32 on the others.
    """
    passes = {
        (SCAN_FORWARD,): forward,
        (SCAN_BACKWARD,): backward,
        (SCAN_FORWARD, SCAN_FORWARD, SCAN_BACKWARD): training,
    }
    for counts, expected in passes.items():
        assert card.floor_seconds(TOKEN, *counts) * 1e6 == pytest.approx(expected, abs=0.06)


# --- the cases ----------------------------------------------------------------------------------------------


def test_every_table_has_both_passes_of_every_shape(monkeypatch):
    monkeypatch.setattr(bench_gpu, "time_of", lambda step, device: step() or 0.5)
    tables = bench_gpu.measure(Target(CPU, torch.float32, "reference", H200), SMALL)
    assert [title.split(",")[0] for title in tables] == ["scan", "convolution", "mixer layer"]
    for title, rows in tables.items():
        ours = [row for row in rows if row["of"] == "mamba-sft"]
        assert [(row["B"], row["L"], row["pass"]) for row in ours] == [
            (1, 24, "forward"), (1, 24, "both"), (2, 8, "forward"), (2, 8, "both"),
        ], title  # fmt: skip
        assert {row["ms"] for row in rows} == {500.0}
        assert {row["times_ours"] for row in rows} == {1.0}
    forward, both = next(iter(tables.values()))[:2]
    updates = 24 * 64 * 4
    assert forward["of_floor"] == pytest.approx(H200.floor_seconds(updates, SCAN_FORWARD) / 0.5)
    assert both["of_floor"] == pytest.approx(
        H200.floor_seconds(updates, SCAN_FORWARD, SCAN_FORWARD, SCAN_BACKWARD) / 0.5
    )
    assert forward["GB_per_s"] == pytest.approx(4 * (4 * 24 * 64 + 2 * 24 * 4) / 0.5 / 1e9)
    assert {row["of"] for row in tables["mixer layer, backend reference, float32"]} == {
        "mamba-sft", "its projections alone",
    }  # fmt: skip


def fake_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):  # noqa: PLR0917  # its own order
    """What mamba_ssm computes, in its layout: (B, D, L) and (B, N, L), contiguous."""
    assert all(x.is_contiguous() for x in (u, delta, B, C, z))
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    options = {"dt_bias": delta_bias, "dt_softplus": delta_softplus, "backend": "reference"}
    return kernels.selective_scan(u, delta, A, B, C, D, z, **options).transpose(1, 2)


def fake_convolution(x, weight, bias=None, activation=None):
    assert activation == "silu"
    y = kernels.causal_conv1d(x.transpose(1, 2), weight, bias, backend="reference")
    return y.transpose(1, 2)


def test_peers_get_the_same_numbers_in_their_own_layout(monkeypatch, caplog):
    fakes = {bench_gpu.SSM: fake_scan, bench_gpu.CONV: fake_convolution}
    monkeypatch.setattr(bench_gpu, "peer", lambda *names: fakes[names])
    with caplog.at_level(logging.INFO, logger="mamba_sft"):
        tables = bench_gpu.measure(Target(CPU, torch.float32, "reference"), SMALL[:1])
    names = [{row["of"] for row in rows} for rows in tables.values()]
    assert names[0] == {"mamba-sft", "mamba_ssm"}
    assert names[1] == {"mamba-sft", "causal_conv1d (B,L,D)", "causal_conv1d (B,D,L)"}
    apart = [float(r.args[1]) for r in caplog.records if "differ" in r.message]
    assert len(apart) == 2
    assert max(apart) < 1e-6


@pytest.mark.parametrize("make", [bench_gpu.scan_cases, bench_gpu.conv_cases])
def test_the_cases_of_a_race_have_equal_gradients(monkeypatch, make):
    fakes = {bench_gpu.SSM: fake_scan, bench_gpu.CONV: fake_convolution}
    monkeypatch.setattr(bench_gpu, "peer", lambda *names: fakes[names])
    found = []
    for case in make(SMALL[0], Target(CPU, torch.float32, "reference")):
        gradients = torch.autograd.grad(case.function(*case.inputs), case.inputs, case.gradient)
        batch, length = SMALL[0].B, SMALL[0].L
        found.append([g if g.shape[:2] == (batch, length) else g.transpose(1, 2) for g in gradients])
    assert len(found) > 1
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y)


def test_an_absent_peer_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="mamba_sft"):
        assert bench_gpu.peer("no_such_module", "function", "no_such_extension") is None
        assert bench_gpu.peer("no_such_module", "function", "no_such_extension") is None
    assert [r.message for r in caplog.records] == [
        "no_such_module is not measured: No module named 'no_such_extension'"
    ]


def test_what_does_not_fit_is_a_row_and_the_next_shape_is_measured():
    x = torch.zeros(1, requires_grad=True)

    def cases(shape, target):
        yield Case("fits", lambda x: 2 * x, (x,), torch.ones(1))
        if shape.L > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    target = Target(CPU, torch.float32, "reference")
    rows = [row for shape in SMALL for row in bench_gpu._rows(cases, shape, target)]
    assert [row["pass"] for row in rows] == ["forward", "both", "no memory", "forward", "both"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_small_shape_on_a_gpu():
    target = Target(torch.device("cuda"), torch.float16, "triton", GpuLimits.of(torch.device("cuda")))
    tables = bench_gpu.measure(target, [RowShape(1, 256, D=256, N=16)])
    rows = [row for rows in tables.values() for row in rows]
    assert all(0 < row["ms"] < 1e3 and row["peak_MiB"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no nvidia-smi, as in some containers")
def test_the_clocks_of_a_gpu():
    assert gpu_limits.clocks(torch.device("cuda"))["driver_version"]


# --- the CPU part -------------------------------------------------------------------------------------------


def test_the_cpu_tables_say_what_the_contract_needs(monkeypatch):
    monkeypatch.setattr(bench_cpu, "exponentials_per_second", lambda: 1e9)
    monkeypatch.setattr(bench_cpu, "best_of", lambda repeats, run: (run(), (2.0, 1.0))[1])
    monkeypatch.setattr(bench_cpu.importlib.util, "find_spec", lambda name: None)
    forward, both = bench_cpu.scan(32, 16, 1)
    updates = 32 * 16 * 16
    assert both["cpu_ns"] == pytest.approx(1e9 / updates)
    assert (forward["floor_cpu_ns"], both["floor_cpu_ns"]) == (1.0, 2.0)
    assert both["of_floor"] == pytest.approx(2 * updates / 1e9)

    rows = bench_cpu.training(16, 8, 1)
    assert [(row["of"], row["tokens"]) for row in rows] == [
        ("mamba-sft", 16), ("mamba-sft", 8), ("transformers", 8),
    ]  # fmt: skip
    assert rows[2]["times_ours"] == 1.0
    assert [row["of"] for row in bench_cpu.training(16, 0, 1)] == ["mamba-sft"]

    rows = bench_cpu.decoding(3, 1)
    assert [row["tokens_per_cpu_s"] for row in rows] == [3.0] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_growth_is_what_a_step_takes():
    grown = bench_cpu.peak_growth(lambda: torch.zeros(64 << 20, dtype=torch.uint8).add_(1))
    assert 60 << 20 < grown < 80 << 20
    assert bench_cpu.peak_growth(lambda: None) < 4 << 20


def test_the_roofline_measures_exponentials():
    assert 1e7 < bench_cpu.exponentials_per_second() < 1e12


# --- from outside -------------------------------------------------------------------------------------------

RESULTS = {
    "benchmark": "kernels",
    "machine": {"date": "2026-01-01", "gpu": "a card"},
    "settings": {"device": "cuda", "quick": True},
    "tables": {
        "scan": [
            {"of": "mamba-sft", "B": 1, "L": 2048, "pass": "both", "ms": 1.234567, "of_floor": 0.512,
             "GB_per_s": 1234.5, "peak_MiB": None, "times_ours": 1.0},
            {"of": "causal_conv1d (B,L,D)", "B": 4, "L": 32768, "pass": "no memory"},
        ]
    },
}  # fmt: skip


@pytest.fixture
def bench(capsys, monkeypatch):
    """Runs `mamba-sft bench kernels` in this process; returns exit code, standard output and error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mamba-sft", "bench", "kernels", *words])
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("device", ["tpu", "no/such", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_message(bench, device):
    code, _, err = bench("--device", device)
    assert code == 2
    assert f"error: no device `{device}`" in err


def test_a_gpu_without_kernels_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "backends", lambda: ["reference", "cpu"])
    monkeypatch.setattr(kernels, "why_unavailable", lambda name: "triton is not installed")
    with pytest.raises(MambaSFTError, match="no GPU kernels to measure: triton is not installed"):
        kernel_benchmark._on_gpu(torch.device("cuda"), quick=True)
    with pytest.raises(UsageError):
        kernel_benchmark.measure_kernels("xpu")


def test_tables_for_people_and_json_for_scripts(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(kernel_benchmark, "measure_kernels", lambda *a, **k: asked.append((a, k)) or RESULTS)
    code, out, _ = bench("--quick")
    assert code == 0
    assert asked == [(("auto",), {"quick": True})]
    assert "gpu a card" in out
    header, first, second = out.splitlines()[-3:]
    assert header.split("  ")[0] == "of"
    assert "peak MiB" not in header  # nobody has any
    assert first.split() == ["mamba-sft", "1", "2048", "both", "1.23", "51%", "1,234", "1"]
    assert second.split()[-4:] == ["-", "-", "-", "-"]
    code, out, _ = bench("--json", "--device", "cpu")
    assert json.loads(out) == RESULTS
    assert asked[-1] == (("cpu",), {"quick": False})


def test_the_gpu_table_fits_a_terminal_of_80_columns():
    file = io.StringIO()
    console = Console(file=file, width=80)
    for part in rendered(RESULTS):
        console.print(part)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("causal_conv1d (B,L,D)" in line for line in lines)


def test_the_script_ends_with_one_line_of_json(monkeypatch, capsys):
    monkeypatch.setattr(kernel_benchmark, "measure_kernels", lambda *a, **k: RESULTS | {"asked": [*a, k]})
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--quick", "--stock-length", "8"])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"), run_name="__main__")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["tables"] == RESULTS["tables"]
    assert last["asked"] == ["auto", {"quick": True, "stock_length": 8}]

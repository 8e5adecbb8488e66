"""What `doctor` says of this machine and, by pretending, of others."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from mamba_sft import kernels
from mamba_sft.cli import app, doctor
from mamba_sft.diagnostics import diagnosis, hardware, software
from mamba_sft.diagnostics.diagnosis import Diagnosis, diagnose, recommended_recipe
from mamba_sft.diagnostics.software import Finding
from mamba_sft.planning import environment
from mamba_sft.recipe.builtin import builtin_recipes

PROCESSOR = {"type": "cpu", "name": "a CPU", "memory_bytes": 16e9}
H100 = {"type": "cuda", "name": "NVIDIA H100", "compute_capability": "9.0", "memory_bytes": 85e9,
        "count": 2, "bfloat16": True}  # fmt: skip
L4 = H100 | {"name": "NVIDIA L4", "compute_capability": "8.9", "memory_bytes": 24e9, "count": 1}
T4 = H100 | {"name": "Tesla T4", "compute_capability": "7.5", "memory_bytes": 15.8e9, "bfloat16": False}


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def verb(capsys, monkeypatch):
    """Runs `mamba-sft doctor` in this process; returns exit code and standard output."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mamba-sft", "doctor", *words])
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().out

    return call


# --- the verb -----------------------------------------------------------------------------------------------


def test_this_machine_can_train_and_the_json_says_why(verb, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    code, text = verb("--json")
    found = json.loads(text)
    assert code == 0
    assert found["status"] in {"ok", "note"}
    assert found["environment"]["device"]["type"] in {"cpu", "cuda"}
    names = {one["name"] for one in found["findings"]}
    assert names >= {"python", "torch", "triton", "number format", "scan", "convolution", "4-bit weights"}
    assert names >= {"runs", "hub cache", "hub token", "start with", "OMP_WAIT_POLICY"}
    assert all(one["fix"] for one in found["findings"] if one["status"] != "ok")
    assert "hf_secret" not in text
    token = next(one for one in found["findings"] if one["name"] == "hub token")
    assert token["text"] == "present"


def test_a_problem_is_shown_with_its_fix_and_the_exit_code(verb, monkeypatch):
    findings = (
        Finding("versions", "torch", "problem", "1.0 is outside >=2.11", "pip install 'torch>=2.11'"),
        Finding("versions", "trl", "ok", "1.16.0 (needs >=1.16)"),
    )
    monkeypatch.setattr(diagnosis, "diagnose", lambda: Diagnosis(findings, {}))
    code, text = verb()
    assert code == 1
    assert text.splitlines() == [
        "versions",
        "  ✗ torch            1.0 is outside >=2.11",
        "                     -> pip install 'torch>=2.11'",
        "  ✓ trl              1.16.0 (needs >=1.16)",
        "1 problem, no notes",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_hanging_indents_and_nothing_too_wide(monkeypatch, width):
    long = Finding("kernels", "triton", "note", "word " * 60, "a fix " * 40)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    monkeypatch.setattr(doctor, "out", console)
    lines = doctor._line(long).plain.splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= width
    assert all(line.startswith(" " * 21) for line in lines[1:])


def test_marks_that_an_old_terminal_can_show(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(doctor, "out", Console(file=file))
    lines = [doctor._line(Finding("a", "b", status, "c")).plain for status in ("ok", "note", "problem")]
    assert [line.split()[0] for line in lines] == ["ok", "!!", "XX"]
    assert all(line.isascii() for line in lines)


@pytest.mark.slow
def test_nothing_is_imported_that_is_not_looked_at():
    code = (
        "import sys; sys.argv[1:] = ['doctor']; from mamba_sft.cli.app import app;"
        "app(standalone_mode=False);"
        "heavy = {'transformers', 'datasets', 'peft', 'trl', 'bitsandbytes', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- software -----------------------------------------------------------------------------------------------


def test_installed_versions_are_held_to_the_declared_ranges(monkeypatch):
    declared = ["torch>=2.11", "trl>=1.16", "numba>=0.66", "rich>=14", "pytest>=9; extra == 'test'"]
    installed = {"torch": "2.11.0rc1", "trl": "1.9", "rich": "13.0", "mamba-ssm": "2.3"}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(software, "requires", lambda name: declared)
    monkeypatch.setattr(software, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    monkeypatch.setattr(software, "version", version)
    found = by_name(software.software_findings())
    statuses = {name: finding.status for name, finding in found.items()}
    assert statuses == {
        "python": "problem", "torch": "problem", "trl": "problem", "numba": "problem", "rich": "problem",
        "others": "ok", "triton": "ok", "compiled": "ok",
    }  # fmt: skip
    assert found["trl"].text == "1.9 is outside >=1.16"
    assert found["numba"].text == "missing, needs >=0.66"
    assert found["numba"].fix == "pip install 'numba>=0.66'"
    assert found["others"].text == "0 of 1 as needed"
    assert found["compiled"].text == "mamba-ssm 2.3: not needed, never used"


def test_a_checkout_that_is_not_installed_is_said(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "requires", requires)
    assert [one.status for one in software.software_findings()] == ["note"]


@pytest.mark.parametrize(("free", "expected"), [(500e9, "ok"), (10e9, "note"), (0.05e9, "problem")])
def test_the_disk_must_hold_the_base_and_a_run(monkeypatch, tmp_path, free, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free)))
    monkeypatch.setattr(software, "base_is_cached", lambda: False)
    found = by_name(software.storage())
    assert found["hub cache"].status == expected
    assert found["runs"].status == ("problem" if expected == "problem" else "ok")


def test_where_nothing_can_be_written_no_free_space_is_spoken_of(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, status in (("runs", "note"), ("hub cache", "problem")):
        found = software._room(name, tmp_path / "file" / "cache", 1.0, "it", "move it")
        assert found.status == status
        assert "file` is a file" in found.text
        assert "free" not in found.text


def test_a_cached_base_needs_no_room(monkeypatch, tmp_path):
    import huggingface_hub

    files = {"model.safetensors.index.json", "a.safetensors", "b.safetensors"}
    index = tmp_path / "index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')

    def cached(repository, name):
        return str(index) if name in files else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(5e9)))
    found = by_name(software.storage())
    assert (found["hub cache"].status, found["7B base"].status) == ("ok", "ok")
    files.remove("b.safetensors")
    assert not software.base_is_cached()
    for damaged in ('{"weight_map": {"x', "[]", "{}", '{"weight_map": 3}', "\xff"):
        index.write_text(damaged, encoding="latin-1")
        found = by_name(software.storage())["7B base"]
        assert (found.status, found.fix) == ("note", f"hf download {software.BASE} --force-download")


# --- hardware -----------------------------------------------------------------------------------------------


def test_a_torch_that_breaks_is_a_problem_not_a_crash(monkeypatch):
    def broken():
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(diagnosis, "_hardware", broken)
    found = diagnose()
    assert found.status == "problem"
    assert any("libcudart" in one.text for one in found.findings)
    assert found.environment == {}


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ("7.5", ["sm_75", "sm_80"], True),
        ("8.9", ["sm_80", "sm_90"], True),
        ("8.0", ["sm_86"], False),
        ("7.0", ["sm_75", "sm_80", "compute_120"], False),
        ("12.1", ["sm_80", "compute_90"], True),
        ("9.0", ["sm_90a"], True),
        ("12.0", ["sm_80", "sm_120"], True),
    ],
)
def test_which_builds_of_torch_run_on_which_cards(capability, built, runs):
    assert hardware._runs_on(capability, built) is runs


def test_a_card_that_torch_is_not_built_for_and_that_is_busy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 << 30, 80 << 30))
    monkeypatch.setattr(hardware, "nvidia_smi", lambda query: ["570.1"])
    found = by_name(hardware.device(H100))
    assert found["GPU"].status == "problem"
    assert "NVIDIA H100, compute capability 9.0 (1 of 2); this torch is built for sm_75" in found["GPU"].text
    assert found["GPU memory"].status == "note"
    assert "driver 570.1" in found["CUDA"].text
    assert found["number format"].text.startswith("bfloat16")


@pytest.mark.parametrize(
    ("facts", "dtype"), [(PROCESSOR, torch.float32), (L4, torch.bfloat16), (T4, torch.float16)]
)
def test_the_number_format_fits_the_device(facts, dtype):
    assert hardware.advised_dtype(facts)[0] is dtype


@pytest.mark.parametrize(("cuda", "fix"), [(None, "CUDA build"), ("13.0", "update the driver")])
def test_a_card_that_lies_idle_is_pointed_out(monkeypatch, cuda, fix):
    monkeypatch.setattr(hardware, "nvidia_smi", lambda query: ["NVIDIA L4", "535.9"])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = hardware._unused_card()
    assert found.status == "note"
    assert "NVIDIA L4" in found.text
    assert fix in found.fix


@pytest.mark.parametrize(("cuda", "said"), [(None, "the right one"), ("13.0", "some 5 GB")])
def test_without_a_card_the_build_of_torch_is_named(monkeypatch, cuda, said):
    monkeypatch.setattr(hardware, "nvidia_smi", lambda query: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = by_name(hardware.device(PROCESSOR))["build of torch"]
    assert said in found.text
    assert (cuda or "without CUDA") in found.text
    monkeypatch.setattr(hardware, "nvidia_smi", lambda query: ["NVIDIA L4", "535.9"])
    assert "build of torch" not in by_name(hardware.device(PROCESSOR))  # the GPU's own line says it


def test_nvidia_smi_is_asked_and_may_fail(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=1*) exit 9;; esac\necho "NVIDIA L4, 550.2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment.nvidia_smi("name,driver_version") == ["NVIDIA L4", "550.2"]
    assert environment.nvidia_smi("name", "1") is None
    program.unlink()
    assert environment.nvidia_smi("name") is None


# --- kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_backend_it_names_is_the_one_that_runs(dtype):
    picked, _ = kernels.automatic("cpu", dtype)
    runs = kernels._implementation("auto", torch.zeros(1, 1, 1, dtype=dtype)).__name__
    assert runs.endswith(kernels.BACKENDS[picked])


def test_kernels_that_work_were_run(monkeypatch):
    monkeypatch.setattr(hardware, "compiled_loops", lambda: True)
    found = by_name(hardware.compute(PROCESSOR))
    assert {found[name].status for name in ("scan", "convolution")} == {"ok"}
    assert found["scan"].text.startswith("cpu; ran here, off the definition by")
    assert "not used" in found["triton"].text
    assert "not used" in found["reference"].text
    assert "cpu" not in found


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_kernels_that_do_not_work_are_a_problem(monkeypatch, fault):
    from mamba_sft.kernels import autograd

    real = autograd.selective_scan

    def faulty(*operands):
        if fault == "broken":
            raise RuntimeError("some context\nillegal instruction")
        y, state = real(*operands)
        return y * 1.001, state

    monkeypatch.setattr(autograd, "selective_scan", faulty)
    found = hardware._operation("scan", "selective_scan", "cpu", False, "cpu")
    assert found.status == "problem"
    assert ("by 2e-03" if fault == "wrong" else "cpu fails: illegal instruction") in found.text


def test_the_definition_alone_is_a_note_with_the_reason(monkeypatch):
    reasons = {"cpu": "No module named 'numba'; pip install numba", "triton": "no GPU", "reference": None}
    monkeypatch.setattr(kernels, "why_unavailable", reasons.get)
    found = by_name(hardware.compute(PROCESSOR))
    for name in ("scan", "convolution"):
        assert found[name].status == "note"
        assert found[name].text == "reference, a slow Python loop"
        assert "pip install numba" in found[name].fix
    assert "No module named 'numba'" in found["cpu"].text


def test_a_cold_cache_is_not_compiled_for_the_asking(monkeypatch):
    monkeypatch.setattr(hardware, "compiled_loops", lambda: False)
    monkeypatch.setattr(hardware, "disagreement", lambda *_: pytest.fail("ran a kernel"))
    found = by_name(hardware.compute(PROCESSOR))
    assert "the first call compiles it" in found["scan"].text
    assert found["numba cache"].text.startswith("not compiled yet, in ")


def test_the_cache_is_warm_after_use_and_cold_after_a_change(monkeypatch, tmp_path):
    for operation in ("selective_scan", "causal_conv1d"):
        assert hardware.disagreement(operation, "cpu", "cpu") < 1e-6
    assert hardware.compiled_loops()
    loops = hardware._entry_loops()
    assert {loop.__name__ for loop in loops} == {
        "scan_forward", "scan_backward", "conv_forward", "conv_backward",
    }  # fmt: skip
    moved = [
        SimpleNamespace(py_func=one.py_func, stats=SimpleNamespace(cache_path=tmp_path)) for one in loops
    ]
    monkeypatch.setattr(hardware, "_entry_loops", lambda: moved)
    assert not hardware.compiled_loops()
    for one in loops:
        code = one.py_func.__code__
        index = tmp_path / f"cpu_loops.{one.__name__}-{code.co_firstlineno}.py311.nbi"
        index.touch()
    assert hardware.compiled_loops()
    os.utime(index, (1, 1))  # older than the source
    assert not hardware.compiled_loops()


@pytest.mark.parametrize("policy", ["ACTIVE", None])
def test_spinning_threads_are_pointed_out(monkeypatch, policy):
    monkeypatch.setattr(hardware, "compiled_loops", lambda: False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    found = by_name(hardware.compute(PROCESSOR))["OMP_WAIT_POLICY"]
    assert (found.status, found.text) == ("note", policy or "unset")


def test_four_bit_weights_that_fail_are_a_note(monkeypatch):
    monkeypatch.setattr(hardware, "PROBE", "raise SystemExit('libbitsandbytes: no kernel image')")
    found = hardware.nf4(hardware.start_nf4_probe(), "cuda")
    assert found.status == "note"
    assert found.text == "bitsandbytes fails: libbitsandbytes: no kernel image"
    monkeypatch.setattr(hardware, "PROBE", "import os; os.abort()")
    assert "exit code -6" in hardware.nf4(hardware.start_nf4_probe(), "cuda").text


# --- the advice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "recipe"),
    [
        (PROCESSOR, "quickstart"),
        (H100, "instruct"),
        (L4, "instruct-qlora"),
        (T4, "instruct-t4"),
        (H100 | {"bfloat16": False}, "instruct-t4"),
        (L4 | {"memory_bytes": 8e9}, "quickstart"),
    ],
)
def test_the_recipe_fits_the_device_and_exists(device, recipe):
    name, why = recommended_recipe(device)
    assert name == recipe
    assert why
    assert name in builtin_recipes()

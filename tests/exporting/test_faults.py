"""Power, disk and input can fail under a merge and an export: no wrong file gets a final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from mamba_sft.errors import ExportError, LockedError, MambaSFTError, MergeError, ModelError, UsageError
from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.gguf import export as gguf_export
from mamba_sft.exporting.gguf import files, probe
from mamba_sft.exporting.gguf.probe import Job, run_probe
from mamba_sft.exporting.hub import checkpoint
from mamba_sft.merging.merge_run import merge
from mamba_sft.model.checkpoint import read_tensors
from mamba_sft.run import Run
from tests.conftest import build_model
from tests.merging.test_merge_run import Made, make_run, merged_logits, relative


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path)


def work(verb: str, made: Made) -> None:
    """Merges, or exports in one of the formats."""
    if verb == "merge":
        merge(made.run)
    elif verb == "hf":
        export(made.run, format="hf")
    elif verb == "adapter":
        export(made.run, adapter_only=True)
    else:
        export(made.run, quantization=["Q8_0", "f32"], format=verb)


def final_files(run: Run) -> list[str]:
    """What merging and exporting left under final names."""
    places = [run.merged, run.export / "hf", *run.export.glob("*.gguf"), *run.export.glob("Modelfile*")]
    return sorted(path.name for path in places if path.exists())


def check_outcome(verb: str, made: Made) -> None:
    """Checks what a run of `work` that went well must have left, and that nothing unfinished lies about."""
    leftovers = [path for path in made.run.path.rglob("*") if path.suffix in (".partial", ".old")]
    assert not leftovers
    if verb in ("merge", "hf"):
        directory = made.run.merged if verb == "merge" else made.run.export / "hf"
        assert relative(merged_logits(directory), made.logits()) < 2e-6
    elif verb != "adapter":
        window = list(range(5, 25))
        seen = run_probe(Job(str(made.run.export / "run.F32.gguf"), [], [window], [], 0)).logits[0]
        with torch.no_grad():
            expected = made.model(torch.tensor([window])).logits[0]
        assert (torch.from_numpy(seen) - expected).abs().max() < 1e-4


# A process that kills itself, as a power cut would, when the work has come to a point.
KILLED = """
import os, signal, sys
from mamba_sft.exporting.export_run import export
from mamba_sft.merging.merge_run import merge

verb, run, stage, share = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])

def progress(now, done, total):
    if now == stage and done >= share * total:
        os.kill(os.getpid(), signal.SIGKILL)

if verb == "merge":
    merge(run, progress=progress)
elif verb == "hf":
    export(run, format="hf", progress=progress)
else:
    export(run, quantization=["Q8_0", "f32"], progress=progress)
"""


@pytest.mark.parametrize(
    ("verb", "stage", "share"),
    [
        ("merge", "merging", 0.5),
        ("merge", "checking", 1.0),
        ("hf", "writing", 0.9),
        ("gguf", "writing", 0.5),
        ("gguf", "verifying", 0.5),
    ],
)
def test_killed_at_any_stage_leaves_no_name_and_runs_again(
    made: Made, verb: str, stage: str, share: float
) -> None:
    command = [sys.executable, "-c", KILLED, verb, str(made.run.path), stage, str(share)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert final_files(made.run) == []
    assert list(made.run.path.rglob("*.partial")), "it must have been in the middle of its work"
    work(verb, made)
    check_outcome(verb, made)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["merge", "hf", "gguf"])
def test_killed_at_any_moment_leaves_a_whole_result_or_none(made: Made, verb: str) -> None:
    command = [sys.executable, "-c", KILLED, verb, str(made.run.path), "never", "2"]
    for wait in (0.5, 2.0, 4.0, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 9.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if final_files(made.run):
            if verb != "gguf":
                directory = made.run.merged if verb == "merge" else made.run.export / "hf"
                assert relative(merged_logits(directory), made.logits()) < 2e-6
            for path in made.run.export.glob("*.gguf"):
                run_probe(Job(str(path), [], [[1, 2, 3]], [], 0))
    work(verb, made)
    check_outcome(verb, made)


@pytest.mark.parametrize("verb", ["gguf", "hf", "adapter"])
def test_a_disk_that_is_really_full(
    made: Made, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    disk = small_disk("size=16k" if verb == "adapter" else "size=256k")
    monkeypatch.setattr(files, "require_space", lambda *_: None)
    monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)
    wanted = ["f32"] if verb == "gguf" else []
    form, place = ("hf", disk / "hf") if verb == "hf" else ("gguf", disk)
    with pytest.raises(ExportError, match="is full"):
        export(made.run, format=form, adapter_only=verb == "adapter", output=place, quantization=wanted)
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_while_headers_are_written(
    made: Made, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("size=4k")
    monkeypatch.setattr(files, "require_space", lambda *_: None)
    with pytest.raises(ExportError, match="is full"):
        export(made.run, quantization=["Q8_0", "f32"], output=disk)
    assert not list(disk.iterdir())


def flip(path: Path, tensor: str, byte: int, bit: int) -> None:
    """Flips one bit of one tensor in a shard."""
    entry = read_tensors(path)[tensor]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + byte)
        value = file.read(1)[0]
        file.seek(entry.start + byte)
        file.write(bytes([value ^ (1 << bit)]))


# Byte 1001 is in none of the samples that tell one base from another, and a low bit of a float's second byte
# changes it by a ten-thousandth: nothing but a checksum sees this.
QUIET = ("backbone.layers.1.mixer.in_proj.weight", 1001, 2)


@pytest.mark.parametrize("verb", ["merge", "hf", "gguf", "ollama"])
def test_a_bit_flipped_in_a_base_shard(made: Made, verb: str) -> None:
    flip(made.base, *QUIET)
    with pytest.raises(ModelError, match=r"in_proj\.weight` in .* is damaged"):
        work(verb, made)
    assert final_files(made.run) == []
    assert not list(made.run.path.rglob("*.partial"))
    flip(made.base, *QUIET)
    work(verb, made)
    check_outcome("gguf" if verb == "ollama" else verb, made)


def test_a_bit_flipped_in_a_merged_shard(made: Made) -> None:
    merge(made.run)
    flip(made.run.merged, *QUIET)
    with pytest.raises(ModelError, match=r"in_proj\.weight` in .*merged.* is damaged"):
        work("gguf", made)
    assert final_files(made.run) == ["merged"]


def test_a_flipped_bit_that_makes_a_nan_is_named_without_checksums(made: Made, tmp_path: Path) -> None:
    value = load_file(next(made.base.glob("*-00001-of-*")))
    name = next(name for name, tensor in value.items() if tensor.ndim == 2)
    entry = read_tensors(made.base)[name]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + 402)
        file.write(b"\xc0\x7f")
    with pytest.raises(ModelError, match="NaN or infinity"):
        export(made.base, quantization="Q8_0", output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("verb", ["merge", "hf", "gguf"])
def test_a_truncated_base_shard(made: Made, verb: str) -> None:
    path = sorted(made.base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        work(verb, made)
    assert final_files(made.run) == []


def test_a_shard_cut_short_while_it_is_read(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gguf_export.prepare_files

    def cut(*arguments: object) -> object:
        planned = plan(*arguments)  # type: ignore[arg-type]
        path = sorted(made.base.glob("*.safetensors"))[-1]
        os.truncate(path, path.stat().st_size // 2)
        return planned

    monkeypatch.setattr(gguf_export, "prepare_files", cut)
    with pytest.raises(ModelError, match="ended early"):
        work("gguf", made)
    assert final_files(made.run) == []
    assert not list(made.run.path.rglob("*.partial"))


def another_base(made: Made) -> None:
    build_model(layer_norm_epsilon=1e-3).save_pretrained(made.base, max_shard_size="100KB")


def another_training(made: Made) -> None:
    path = made.run.adapter / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if ".layers.1." not in name}
    save_file(weights, path, metadata={"format": "pt"})


def no_adapter(made: Made) -> None:
    (made.run.adapter / "adapter_model.safetensors").unlink()


def cut_adapter(made: Made) -> None:
    path = made.run.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("verb", ["merge", "hf", "gguf", "adapter"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (another_base, "not the base"),
        (another_training, "target but has no LoRA"),
        (no_adapter, "no adapter"),
        (cut_adapter, "truncated"),
    ],
)
def test_a_wrong_adapter(made: Made, verb: str, fault: Callable[[Made], None], message: str) -> None:
    fault(made)
    with pytest.raises(MergeError, match=message):
        work(verb, made)
    assert final_files(made.run) == []


def test_a_check_killed_for_its_memory_says_so(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    run = subprocess.run
    monkeypatch.setattr(probe.subprocess, "run", lambda command, **options: run(killed, **options))
    with pytest.raises(ExportError, match="when memory runs out") as caught:
        work("gguf", made)
    assert "--no-verify" in str(caught.value.hint)
    assert not list(made.run.export.glob("*.gguf*"))


def test_an_export_that_fails_keeps_what_was_there(made: Made) -> None:
    work("ollama", made)
    before = {path.name: path.read_bytes() for path in made.run.export.iterdir()}
    flip(made.base, *QUIET)
    with pytest.raises(MambaSFTError):
        work("ollama", made)
    assert {path.name: path.read_bytes() for path in made.run.export.iterdir()} == before


def test_runs_from_before_checksums_still_merge_and_export(made: Made) -> None:
    path = made.run.adapter / "base.json"
    facts = json.loads(path.read_text())
    del facts["checksums"]
    path.write_text(json.dumps(facts))
    work("gguf", made)
    check_outcome("gguf", made)
    shutil.rmtree(made.run.export)
    work("merge", made)
    check_outcome("merge", made)


@pytest.mark.parametrize("verb", ["merge", "hf"])
@pytest.mark.parametrize("name", ["thesis.tex", "mine/config.json", "run.Q4_K_M.gguf", "link"])
def test_what_lies_in_an_earlier_result_is_not_replaced_with_it(made: Made, verb: str, name: str) -> None:
    work(verb, made)
    place = made.run.merged if verb == "merge" else made.run.export / "hf"
    path = place / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        path.symlink_to(made.run.adapter)
    else:
        path.write_text("years of work")
    first = name.split("/", maxsplit=1)[0]
    with pytest.raises(UsageError, match=f"holds what no model consists of: `{first}"):
        work(verb, made)
    assert os.path.lexists(path)


@pytest.mark.parametrize("verb", ["merge", "hf"])
def test_a_result_that_is_a_link_is_not_followed(made: Made, verb: str, tmp_path: Path) -> None:
    work(verb, made)
    place = made.run.merged if verb == "merge" else made.run.export / "hf"
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"is a link to `.*elsewhere`, which is not followed"):
        work(verb, made)
    assert place.is_symlink()


SECOND = """
import os, sys, time
from mamba_sft import export, merge
def progress(stage, done, total):
    print("at work", flush=True)
    time.sleep(60)
verb, run = sys.argv[1:]
if verb == "merge":
    merge(run, progress=progress)
else:
    export(run, format="hf" if verb == "hf" else "gguf", progress=progress)
"""


@pytest.mark.parametrize("first", ["merge", "gguf"])
def test_a_second_writer_is_refused_and_destroys_nothing(made: Made, first: str) -> None:
    command = [sys.executable, "-c", SECOND, first, str(made.run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "at work\n"
        halves = list(made.run.path.rglob("*.partial"))
        verb = "merge" if first == "merge" else "export"
        for second in ("merge", "hf", "gguf", "adapter"):
            message = rf"is being written by `mamba-sft {verb}`: process {other.pid} on `"
            with pytest.raises(LockedError, match=message):
                work(second, made)
        assert halves
        assert list(made.run.path.rglob("*.partial")) == halves
        other.kill()
    work(first, made)
    check_outcome(first, made)

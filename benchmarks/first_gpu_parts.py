"""The parts of `first_gpu_run.py`, which starts each in a process of its own.

    python benchmarks/first_gpu_parts.py decode --quantization nf4 --device cpu --tiny --rows rows.jsonl

Appends its results to the file as they come, one line of JSON each. What it measures is measured by others:
`mamba-sft doctor` and `bench kernels`, the tests, `bench_train_step.py`; peaks and rates of a card come from
`planning/gpus.py`, planned memory and time from `planning/`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parents[1]
BUDGET, REPEATS = 45, 5
"""Seconds after which no further training step is begun, and steps."""
ROOM = 0.9
"""Of a card's memory that a model with fewer layers is made for."""
FLOAT16_LARGEST = 65504
WATCHED = ("differ by", "is not measured")
"""What the kernel benchmark says of its peers, kept as notes."""

Options = argparse.Namespace
Emit = Callable[..., None]


def doctor(options: Options, emit: Emit) -> None:
    """Emits the machine's facts, and what `doctor` has to remark."""
    import torch

    from mamba_sft.diagnostics.diagnosis import diagnose
    from mamba_sft.diagnostics.hardware import OPERATIONS
    from mamba_sft.diagnostics.kernel_benchmark import machine

    diagnosis = diagnose()
    findings = [asdict(finding) for finding in diagnosis.findings if finding.section != "storage"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emit(facts=diagnosis.environment | {"findings": findings, "machine": machine(device)})
    for finding in findings:
        print(finding["status"], finding["name"], finding["text"])
        if finding["status"] != "ok" or finding["name"] in OPERATIONS:
            emit(note=f"doctor: {finding['name']}: {finding['text']}")
    need_a_gpu(options)


def need_a_gpu(options: Options) -> None:
    """Raises where a CPU would compute what is asked of a GPU: 7B shapes for hours, and under its name."""
    import torch
    from first_gpu_run import NO_GPU

    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(NO_GPU)


def tests(options: Options, emit: Emit) -> None:
    """Runs the tests that need a GPU, or the kernels' others; emits those that fail and a sum."""
    import pytest

    if options.which == "gpu":
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _has_gpu_test(path)]
        words = ["-m", "gpu"]
    else:
        files, words = [ROOT / "tests" / "kernels"], []
    counts, start = dict.fromkeys(("passed", "failed", "skipped"), 0), time.monotonic()

    class Listener:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
                if report.failed:
                    crash = getattr(report.longrepr, "reprcrash", None)
                    why = (crash.message if crash else str(report.longrepr)).strip()
                    emit(table="tests", test=report.nodeid, outcome=f"failed: {why.splitlines()[0]}")

    words += ["-v", "-p", "no:cacheprovider", *map(str, files)]
    code = pytest.main(words, plugins=[Listener()])
    summed = ", ".join(f"{count} {name}" for name, count in counts.items())
    emit(table="tests", test=f"{options.which}: all", outcome=summed, seconds=time.monotonic() - start)
    if code:
        failed = counts["failed"]
        raise RuntimeError(f"{failed} tests failed" if failed else f"pytest ended with code {code:d}")


def _has_gpu_test(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8") and path.stem != "test_first_gpu_run"


def kernels(options: Options, emit: Emit) -> None:
    """Measures scan, convolution and mixer as `bench kernels` does, a shape at a time."""
    import torch

    from mamba_sft.diagnostics import bench_gpu
    from mamba_sft.diagnostics.gpu_limits import GpuLimits
    from mamba_sft.planning.environment import describe_device

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            print(text, flush=True)
            if any(words in text for words in WATCHED):
                emit(note=text)

    bench_gpu.logger.setLevel(logging.INFO)
    bench_gpu.logger.addHandler(Listener())
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        dtype = torch.bfloat16 if describe_device()["bfloat16"] else torch.float16
        target = bench_gpu.Target(device, dtype, "triton", GpuLimits.of(device))
    else:
        target = bench_gpu.Target(torch.device("cpu"), torch.float32, "cpu")
    shapes = [bench_gpu.RowShape(1, 64, D=64, N=16)] if options.tiny else bench_gpu.ROW_SHAPES
    for shape in shapes:
        for title, rows in bench_gpu.measure(target, [shape]).items():
            for row in rows:
                emit(table=title, **row)


def train(options: Options, emit: Emit) -> None:
    """Measures a training step; with fewer layers, and saying so, where the card is too small for all."""
    import torch
    from bench_train_step import measure

    for words, layers, of in attempts(options, emit):
        try:
            result = measure(words, 1 if options.tiny else REPEATS, False, layers=layers, budget=BUDGET)
        except torch.OutOfMemoryError as error:
            what = f"{step_name(options)}, {options.length:,} tokens, {layers} of {of} layers, {words[-1]}"
            emit(note=f"{what}: {str(error).split('. ')[0]}")
        else:
            emit(
                table="training", step=step_name(options), layers=f"{layers} of {of}",
                checkpointing=words[-1].rpartition("=")[2], tokens=result["tokens"],
                **{
                    "tokens/s": result["tokens_per_second"],
                    "planned tokens/s": result["planned_tokens_per_second"],
                    "MFU": result["mfu"],
                    "with repeats": result["with_repeats"],
                    "peak GB": result["peak_bytes"] / 1e9,
                    "planned GB": result["planned_peak_bytes"] / 1e9,
                },
            )  # fmt: skip
            return
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError("out of memory, with fewer layers too")


def attempts(options: Options, emit: Emit) -> Iterator[tuple[list[str], int, int]]:
    """Yields recipes by their words, with the layers to take and all layers, until one has fitted.

    All layers with what keeps the more activations, if the plan says that it fits, else with `block`; then,
    or if the plan is above the card by a tenth, as many layers as it gives nine tenths of the card's memory.
    """
    from bench_train_step import load

    from mamba_sft.planning.memory import peak, planned_parts

    usable = usable_bytes()
    for policy in ("mamba", "block"):
        words = recipe_words(options, policy)
        _, shape, work = load(words)
        planned = peak(planned_parts(work))
        if planned <= usable or (policy == "block" and planned <= 1.1 * usable):
            yield words, shape.layers, shape.layers
    if planned > usable:
        text = f"planned at {planned / 1e9:.1f} GB, which this device's {usable / 1e9:.1f} GB do not hold"
        emit(note=f"{step_name(options)}, {options.length:,} tokens, {shape.layers} layers: {text}")

    def fits(layers: int) -> bool:
        smaller = replace(work, shape=replace(shape, layers=layers))
        return peak(planned_parts(smaller)) <= ROOM * usable

    fewer = most_layers(shape.layers - 1, fits)
    if fewer:
        yield words, fewer, shape.layers


def most_layers(layers: int, fits: Callable[[int], bool]) -> int:
    """Returns the most layers that fit, 0 if none do."""
    return next((count for count in range(layers, 0, -1) if fits(count)), 0)


def usable_bytes() -> int:
    from mamba_sft.planning.environment import describe_device
    from mamba_sft.planning.gpus import recognized

    return recognized(describe_device()).usable_bytes


def recipe_words(options: Options, policy: str = "block") -> list[str]:
    """Returns `instruct` with one row of the asked length, and the optimizer that the step has."""
    words = [
        "instruct", f"data.max_length={options.length}", f"model.quantization={options.quantization}",
        "train.per_device_train_batch_size=1", "train.optim=adamw_torch_fused",
    ]  # fmt: skip
    words += [f"train.stream_tokens={options.stream}"] if options.stream else []
    words += ["model.base=data/tiny-base"] if options.tiny else []
    return [*words, f"train.checkpointing={policy}"]


def step_name(options: Options) -> str:
    weights = number_format() if options.quantization == "none" else options.quantization
    return weights + (f", chunks of {options.stream}" if options.stream else "")


def number_format() -> str:
    import torch

    native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp16"


def model_that_fits(options: Options, emit: Emit) -> tuple[Any, Any, str]:
    """Returns a model to be asked, its work as plans see it, and how many of its layers there are."""
    from bench_train_step import build, load

    from mamba_sft.kernels.falcon_mamba import install
    from mamba_sft.model.loading import resolve_dtype
    from mamba_sft.planning.memory import weights

    recipe, shape, work = load(recipe_words(options))

    def fits(layers: int) -> bool:
        return weights(replace(work, shape=replace(shape, layers=layers))) <= ROOM * usable_bytes()

    layers = most_layers(shape.layers, fits)
    if layers < shape.layers:
        text = f"{weights(work) / 1e9:.1f} GB of weights do not fit, {layers} of {shape.layers} layers do"
        emit(note=f"{step_name(options)}: {text}")
    recipe, smaller, work = load(recipe_words(options), layers)
    model = build(recipe, smaller, resolve_dtype(recipe.model))
    return install(model, recipe.model.kernels).eval(), work, f"{layers} of {shape.layers}"


def decode(options: Options, emit: Emit) -> None:
    """Measures answers of a fixed length, alone and eight together."""
    import torch

    from mamba_sft.inference.generation import answers
    from mamba_sft.inference.sampling import Sampling
    from mamba_sft.planning.environment import describe_device
    from mamba_sft.planning.gpus import recognized
    from mamba_sft.planning.memory import weights

    model, work, layers = model_that_fits(options, emit)
    prompt, new = (16, 8) if options.tiny else (512, 128)
    silent = SimpleNamespace(decode=lambda ids, **_: "")
    bandwidth = recognized(describe_device()).bandwidth
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, count: int) -> float:
        prompts = torch.randint(3, work.shape.vocabulary, (batch, prompt), generator=generator).tolist()
        start = time.perf_counter()
        sampling = Sampling(max_new_tokens=count)
        answers(model, silent, prompts, sampling=sampling, stop_ids=(), batch_size=batch)
        return time.perf_counter() - start

    for batch in (1, 8):
        seconds(batch, 4)  # compiles
        first, all_of_them = (min(seconds(batch, count) for _ in range(2)) for count in (1, new))
        steps = (new - 1) / max(all_of_them - first, 1e-9)
        emit(
            table="decoding", weights=step_name(options), layers=layers, batch=batch, prompt=prompt,
            **{
                "read tokens/s": batch * prompt / first,
                "tokens/s": batch * steps,
                "of bandwidth": weights(work) * steps / bandwidth if bandwidth else None,
            },
        )  # fmt: skip


def residual(options: Options, emit: Emit) -> None:
    """Measures the largest number of the residual after any layer, and the logits against the definition."""
    import torch

    from mamba_sft.kernels.falcon_mamba import install

    if options.base:
        from mamba_sft.model.loading import load_model
        from mamba_sft.recipe.fields import ModelSection

        model = load_model(ModelSection(base=options.base, dtype="bfloat16"))
        count = model.config.num_hidden_layers
        name, layers = Path(options.base).name, f"{count} of {count}"
    else:
        model, _, layers = model_that_fits(options, emit)
        name = f"{number_format()}, random"
    tokens, checked = (64, 16) if options.tiny else (2048, 64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator).to(model.device)
    largest: list[float] = []
    hooks = [
        block.register_forward_hook(lambda module, given, out: largest.append(float(out.abs().max())))
        for block in model.backbone.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        fast = model(ids[:, :checked], use_cache=False).logits.float()
        exact = install(model, "reference")(ids[:, :checked], use_cache=False).logits.float()
    apart = (fast - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    most = max(largest)
    emit(
        table="residual", weights=name, layers=layers, tokens=tokens, largest=most,
        **{
            "after layer": largest.index(most) + 1,
            "of float16's 65504": most / FLOAT16_LARGEST,
            "logits off": float(apart),
            "of each layer": largest,
        },
    )  # fmt: skip


def end_with_parent() -> None:
    """Ends this process and what it started when the run that started it is gone; no GPU stays taken."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {part.__name__: part for part in (doctor, tests, kernels, train, decode, residual)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("which", nargs="?", choices=("gpu", "kernel"), default="gpu", help="tests to run")
    parser.add_argument("--rows", type=Path, required=True, help="where results are appended")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--stream", type=int, help="tokens of a chunk")
    parser.add_argument("--base", help="real weights, for the residual")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    end_with_parent()
    with contextlib.suppress(OSError):  # where memory is short this process goes, not the run
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")

    def emit(**row: Any) -> None:
        text = json.dumps(row, default=str)
        for path, short in ((ROOT, "."), (Path.home(), "~")):  # whose they are is nobody's business
            text = text.replace(f"{path}/", f"{short}/") if len(path.parts) > 1 else text
        with options.rows.open("a", encoding="utf-8") as out:
            out.write(text + "\n")

    try:
        if options.part != "doctor":
            need_a_gpu(options)
        parts[options.part](options, emit)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        text = first if type(error) is RuntimeError else f"{type(error).__name__}: {first}"
        emit(error=text)
        raise


if __name__ == "__main__":
    sys.exit(main())

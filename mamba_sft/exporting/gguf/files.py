"""GGUF files of a model: planned, written, checked through llama.cpp, and only then given their names."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_sft.disk import disk_errors_explained, require_space
from mamba_sft.errors import ExportError
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.importance import importance_matrix
from mamba_sft.exporting.gguf.metadata import Vocabulary, read_vocabulary
from mamba_sft.exporting.gguf.tensors import ExportTensor, epsilon_scale, export_tensors
from mamba_sft.exporting.gguf.types import METHODS, Method
from mamba_sft.exporting.gguf.verifying import Verifier
from mamba_sft.exporting.gguf.writing import FileLayout, GGUFFiles, Importance, lay_out_file, write_header
from mamba_sft.exporting.request import GGUFFile, GGUFOptions, Progress, Quality
from mamba_sft.exporting.texts import calibration_text
from mamba_sft.llama_cpp import library as llama_cpp
from mamba_sft.run import QUALITY, own_partial, write_atomically
from mamba_sft.run_reading import read_quality
from mamba_sft.wording import size_text


@dataclass
class PreparedFiles:
    """Files that can be written.

    Args:
        model: The model.
        output: The directory they go to.
        tensors: What each file holds.
        vocabulary: The tokenizer.
        files: Path, size and method of each.
        layouts: The same files' types and places.
        scale: What `ssm_x` is multiplied with; see `tensors`.
        of: What they hold: the run's `model`, or the `base` of an adapter that is a file of its own.
    """

    model: FullModel
    output: Path
    tensors: list[ExportTensor]
    vocabulary: Vocabulary
    files: list[GGUFFile]
    layouts: list[FileLayout]
    scale: float
    of: str = "model"

    @property
    def nbytes(self) -> int:
        """Disk that all files take."""
        return sum(file.nbytes for file in self.files)


def prepare_files(
    model: FullModel, methods: Sequence[Method], output: Path, name: str, options: GGUFOptions
) -> PreparedFiles:
    """Settles everything about the files, from shapes and the tokenizer, before a weight is read.

    Raises:
        MambaSFTError: llama.cpp cannot run the model or its tokenizer, or its code is not installed.
    """
    llama_cpp.load()
    tensors = export_tensors(model.shapes, model.config, tied=model.tied, fix_epsilon=options.fix_epsilon)
    vocabulary = read_vocabulary(model)
    layouts = [lay_out_file(method, tensors) for method in methods]
    with tempfile.TemporaryDirectory() as directory:  # headers differ in a number, not in length
        header = write_header(Path(directory) / "header", layouts[0], model, vocabulary, tensors)
    files = [
        GGUFFile(
            output / f"{name}.{prepared.method.name}.gguf", prepared.method.name, header + prepared.nbytes
        )
        for prepared in layouts
    ]
    scale = epsilon_scale(model.config) if options.fix_epsilon else 1.0
    return PreparedFiles(model, output, tensors, vocabulary, files, layouts, scale)


def write_gguf(prepared: PreparedFiles, options: GGUFOptions, progress: Progress) -> list[GGUFFile]:
    """Writes the files, checks them, gives them their names, and adds them to `quality.json`.

    Raises:
        ExportError: The disk is too full, or a file failed its check; the files that passed are kept.
        ModelError: The weights are damaged.
    """
    hint = "ask for fewer quantizations, or give a directory on another disk with `--output`"
    sizes = [file.nbytes for file in prepared.files]
    require_space(prepared.output, sizes, "the files take", ExportError, hint)
    prepared.output.mkdir(parents=True, exist_ok=True)
    importance: Importance = {}
    origin = None
    if options.imatrix:
        text = calibration_text(prepared.model, options.imatrix_tokens)
        origin = f"{sum(map(len, text.windows))} tokens: {text.origin}"
        importance = importance_matrix(
            prepared.model, text.windows, lambda d, n: progress("importance matrix", d, n)
        )
    partials = [own_partial(file.path) for file in prepared.files]
    need = f"the files take {size_text(prepared.nbytes)}"
    try:
        with disk_errors_explained(prepared.output, need, ExportError):
            total = sum(tensor.values for tensor in prepared.tensors)
            files = GGUFFiles(
                prepared.model, prepared.tensors, importance, lambda d: progress("writing", d, total)
            )
            files.write(partials, prepared.layouts, prepared.vocabulary)
        return _publish(prepared, partials, options, origin, progress)
    finally:
        for path in partials:
            path.unlink(missing_ok=True)


def _publish(
    prepared: PreparedFiles,
    partials: Sequence[Path],
    options: GGUFOptions,
    imatrix: str | None,
    progress: Progress,
) -> list[GGUFFile]:
    failures: list[ExportError] = []
    written = list(prepared.files)
    facts: dict[str, Any] = {"of": prepared.of, "epsilon_scale": prepared.scale, "imatrix": imatrix}
    if options.verify:
        qualities, text, failures = _verify(prepared, partials, progress)
        written = [
            GGUFFile(file.path, file.method, file.nbytes, quality)
            for file, quality in zip(prepared.files, qualities, strict=True)
        ]
        facts |= text
    passed = []
    for file, partial in zip(written, partials, strict=True):
        if file.quality is not None or not options.verify:
            os.replace(partial, file.path)
            passed.append(file)
    record_quality(prepared.output / QUALITY, passed, facts)
    if failures:
        raise ExportError("\n".join(failure.message for failure in failures), hint=failures[0].hint)
    return passed


def _verify(
    prepared: PreparedFiles, partials: Sequence[Path], progress: Progress
) -> tuple[list[Quality | None], dict[str, Any], list[ExportError]]:
    """Measures each set of tensors once: files that differ in their header alone share what was seen."""
    verifier = Verifier(prepared.model, lambda done, total: progress("reference", done, total))
    measured: dict[tuple[int, ...], tuple[Quality, list[int]]] = {}
    failures: dict[tuple[int, ...], ExportError] = {}
    for number, (layout, partial) in enumerate(zip(prepared.layouts, partials, strict=True)):
        progress("verifying", number, len(partials))
        if layout.payload not in measured and layout.payload not in failures:
            try:
                measured[layout.payload] = verifier.check(partial, layout.method)
            except ExportError as error:
                failures[layout.payload] = error
    progress("verifying", len(partials), len(partials))
    qualities = {}
    if measured:
        qualities = dict(zip(measured, verifier.compare_answers(list(measured.values())), strict=True))
    text = {"text": verifier.text.origin, "prompt": verifier.question}
    return [qualities.get(file.payload) for file in prepared.layouts], text, list(failures.values())


def record_quality(path: Path, files: Sequence[GGUFFile], facts: dict[str, Any]) -> None:
    """Adds files to `quality.json`; entries of files that are gone are dropped."""
    known = read_quality(path)
    for file in files:
        quality = asdict(file.quality) if file.quality else {"verified": False}
        known[file.path.name] = {"method": file.method, "nbytes": file.nbytes} | quality | facts
    known = {name: entry for name, entry in known.items() if (path.parent / name).is_file()}
    write_atomically(path, json.dumps({"files": known}, indent=2, ensure_ascii=False) + "\n")


def verify_adapter(model: FullModel, base: GGUFFile, adapter: Path, progress: Progress) -> Quality:
    """Loads a GGUF LoRA on a file of its base, and holds the two against the model.

    Raises:
        ExportError: Together they are not the model.
    """
    verifier = Verifier(model, lambda done, total: progress("reference", done, total))
    found = verifier.check(base.path, METHODS[base.method], adapter)
    return verifier.compare_answers([found])[0]

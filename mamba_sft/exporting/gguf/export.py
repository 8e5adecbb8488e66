"""The exports that are GGUF files: a model, an adapter, either with Modelfiles."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from mamba_sft.disk import disk_errors_explained
from mamba_sft.errors import ExportError, UsageError
from mamba_sft.evaluation.report import write_report
from mamba_sft.exporting.full_model import FullModel, base_of, find_model
from mamba_sft.exporting.gguf.files import (
    PreparedFiles,
    prepare_files,
    record_quality,
    verify_adapter,
    write_gguf,
)
from mamba_sft.exporting.gguf.lora import write_adapter
from mamba_sft.exporting.gguf.types import choose_methods
from mamba_sft.exporting.hub.export import push_gguf
from mamba_sft.exporting.ollama.modelfile import modelfile_text, what_ollama_lacks
from mamba_sft.exporting.request import Exported, ExportRequest, GGUFFile, output_of
from mamba_sft.merging.preparing import match_adapter
from mamba_sft.run import (
    HUB_CHECKPOINT,
    MODEL_CARD,
    QUALITY,
    Run,
    own_partial,
    write_atomically,
)

logger = logging.getLogger(__name__)


def prepare_model(request: ExportRequest) -> PreparedFiles:
    """Settles a model's GGUF files without writing any."""
    model = find_model(request.run)
    methods = choose_methods(list(request.quantization) or ["Q4_K_M"])
    output = output_of(model, request.output)
    return prepare_files(model, methods, output, request.name or model.name, request.gguf)


def export_model(request: ExportRequest, *, ollama: bool) -> Exported:
    """Writes a model's GGUF files and, for Ollama, a Modelfile for each."""
    prepared = prepare_model(request)
    texts = [modelfile_text(prepared.model, file.path.name) for file in prepared.files] if ollama else []
    _tell_what_ollama_lacks(prepared.model, ollama=ollama)
    with disk_errors_explained(prepared.output, "what belongs to the files does not fit", ExportError):
        files = write_gguf(prepared, request.gguf, request.progress)
        _refresh_report(prepared)
        others = _write_modelfiles(prepared.output, files, texts)
    paths, name = [file.path for file in files], request.name or prepared.model.name
    pushed = push_gguf(prepared.model, name, paths, others, request)
    return Exported(prepared.output, files, others, pushed)


def export_adapter(request: ExportRequest, *, ollama: bool) -> Exported:
    """Writes a run's adapter as a GGUF LoRA and, where a quantization is asked for, its base to load it on.

    The base has the run's tokenizer: the one it was published with does not know the chat's special tokens.
    With a base, the two are loaded together and held against the model; without, the file is read back.
    """
    run = Run.open(request.run)
    options = request.gguf
    if ollama and not request.quantization:
        raise UsageError(
            "a Modelfile for an adapter needs the base beside it",
            hint="say which with `--quantization`, for example `-q Q4_K_M`",
        )
    prepared = match_adapter(run, run.export, None)
    model = find_model(run)
    output = output_of(model, request.output)
    name = request.name or model.name
    path = output / f"{name}.lora.gguf"
    partial = own_partial(path)
    base_files = None
    if request.quantization:
        base, methods = base_of(run, prepared), choose_methods(list(request.quantization))
        base_files = prepare_files(base, methods, output, f"{name}.base", options)
        base_files.of = "base"
    bases = base_files.files if base_files and ollama else []
    texts = [modelfile_text(model, file.path.name, adapter=path.name) for file in bases]
    _tell_what_ollama_lacks(model, ollama=ollama)
    with disk_errors_explained(output, "the adapter does not fit", ExportError):
        output.mkdir(parents=True, exist_ok=True)
        try:
            size = write_adapter(partial, prepared, name=name, fix_epsilon=options.fix_epsilon)
            files = write_gguf(base_files, options, request.progress) if base_files else []
            quality = (
                verify_adapter(model, files[-1], partial, request.progress)
                if files and options.verify
                else None
            )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        adapter = GGUFFile(path, "LoRA", size, quality)
        on = {"on": files[-1].path.name} if files else {}
        record_quality(output / QUALITY, [adapter], {"fix_epsilon": options.fix_epsilon} | on)
        return Exported(output, [*files, adapter], _write_modelfiles(output, files, texts))


def _tell_what_ollama_lacks(model: FullModel, *, ollama: bool) -> None:
    if ollama and (left_out := what_ollama_lacks(model)) is not None:
        logger.warning("%s", left_out)


def _refresh_report(prepared: PreparedFiles) -> None:
    """Adds the files to the run's report, if they are the run's, and tells of a card that lacks them."""
    run = prepared.model.run
    if run is None or prepared.output.resolve() != run.export.resolve():
        return
    if run.report.is_file():
        write_report(run)
    if (card := run.export / HUB_CHECKPOINT / MODEL_CARD).is_file():
        again = f"mamba-sft export {quote(str(run.path))} --format hf"
        logger.warning("`%s` does not list these files yet; `%s` writes it anew", card, again)


def _write_modelfiles(output: Path, files: Sequence[GGUFFile], texts: Sequence[str]) -> list[Path]:
    written = []
    for file, text in zip(files, texts, strict=False):
        path = output / ("Modelfile" if len(texts) == 1 else f"Modelfile.{file.method}")
        write_atomically(path, text)
        written.append(path)
    return written

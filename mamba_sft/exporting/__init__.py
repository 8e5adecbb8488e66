"""A finished run on its way out: a checkpoint for the hub, GGUF files, Ollama.

`export` is all that other code needs; each file beside this one has one part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_sft.errors import UsageError

if TYPE_CHECKING:
    from mamba_sft.exporting.gguf import GGUFOptions, Progress
    from mamba_sft.exporting.tasks import Exported
    from mamba_sft.run import Run

FORMATS = ("gguf", "hf", "ollama")
DEFAULT_QUANTIZATION = "Q4_K_M"


def export(
    run: Run | str | Path,
    *,
    format: str = "gguf",
    quantization: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    adapter_only: bool = False,
    options: GGUFOptions | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Exports a run, or any FalconMamba checkpoint.

    Args:
        run: A run, its directory, or the directory of a checkpoint.
        format: `gguf`; `ollama`, which is GGUF with a Modelfile; or `hf`, a checkpoint with its model card.
        quantization: One or several of the GGUF methods, or `all`; by default `Q4_K_M`.
        output: Where to; by default the run's `export/`.
        name: What the files are called; by default what the run is called.
        adapter_only: Write the adapter as a GGUF LoRA; with a quantization, also its base to load it on.
        options: How GGUF files are made.
        progress: Told how far it is.

    Returns:
        What was written.

    Raises:
        MambaSFTError: It cannot be exported, or a file failed its check.
    """
    from mamba_sft.exporting import tasks

    if format not in FORMATS:
        raise UsageError(f"no format `{format}`", hint=f"there are {', '.join(FORMATS)}")
    names = [quantization] if isinstance(quantization, str) else list(quantization or [])
    task = tasks.Task(run, names, output, name, options, progress or (lambda stage, done, total: None))
    if format == "hf":
        if names or adapter_only:
            raise UsageError("`quantization` and `adapter_only` belong to GGUF files, not to format `hf`")
        return tasks.export_checkpoint(task)
    if adapter_only:
        return tasks.export_adapter(task, ollama=format == "ollama")
    return tasks.export_model(task, ollama=format == "ollama")

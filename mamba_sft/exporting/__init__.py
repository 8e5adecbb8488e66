"""A finished run on its way out: a checkpoint for the hub, GGUF files, Ollama.

`export` is all that other code needs; each file beside this one has one part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import UsageError

if TYPE_CHECKING:
    from mamba_sft.exporting.gguf import GGUFOptions, Progress
    from mamba_sft.run import Run

FORMATS = ("gguf", "hf", "ollama")


def export(
    run: Run | str | Path,
    *,
    format: str = "gguf",
    quantization: str | Sequence[str] = "Q4_K_M",
    output: str | Path | None = None,
    name: str | None = None,
    options: GGUFOptions | None = None,
    progress: Progress | None = None,
) -> list[Any]:
    """Exports a run, or any FalconMamba checkpoint.

    Args:
        run: A run, its directory, or the directory of a checkpoint.
        format: `gguf`.
        quantization: For `gguf`: one or several of the methods, or `all`.
        output: Where to; by default the run's `export/`.
        name: What the files are called; by default what the run is called.
        options: How GGUF files are made.
        progress: Told how far it is.

    Returns:
        The files written, as `GGUFFile`.

    Raises:
        MambaSFTError: It cannot be exported, or a file failed its check.
    """
    from mamba_sft.exporting.gguf import GGUFOptions, plan_gguf, write_gguf
    from mamba_sft.exporting.gguf_types import choose_methods
    from mamba_sft.exporting.weights import find_model

    if format not in FORMATS:
        raise UsageError(f"no format `{format}`", hint=f"there are {', '.join(FORMATS)}")
    methods = choose_methods([quantization] if isinstance(quantization, str) else list(quantization))
    model = find_model(run)
    options = options or GGUFOptions()
    plan = plan_gguf(model, methods, output_of(model, output), name or model.name, options)
    return write_gguf(plan, options, progress or (lambda stage, done, total: None))


def output_of(model: Any, output: str | Path | None) -> Path:
    """Returns where a model is exported to: what was asked for, or the run's `export/`.

    Raises:
        UsageError: Neither is there, or it is what would be exported.
    """
    from mamba_sft.exporting.weights import check_output

    if output is None and model.run is None:
        raise UsageError("where to? a checkpoint outside a run has no `export/`", hint="give `--output`")
    place = Path(output) if output is not None else model.run.export
    check_output(place, model)
    return place

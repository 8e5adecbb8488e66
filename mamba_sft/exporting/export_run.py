"""A finished run on its way out: a checkpoint for the hub, GGUF files, Ollama.

`export` is all that other code needs; each file beside this one has one part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_sft.errors import UsageError
from mamba_sft.model.checkpoint import read_config
from mamba_sft.run import Run
from mamba_sft.run_lock import hold_output

if TYPE_CHECKING:
    from mamba_sft.exporting.request import Exported, GGUFOptions, HubOptions, Progress

FORMATS = ("gguf", "hf", "ollama")


def export(
    run: Run | str | Path,
    *,
    format: str = "gguf",
    quantization: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    adapter_only: bool = False,
    options: GGUFOptions | HubOptions | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Exports a run, or any FalconMamba checkpoint.

    Args:
        run: A run, its directory, or the directory of a checkpoint.
        format: `gguf`; `ollama`, which is GGUF with a Modelfile; or `hf`, a checkpoint with its model card.
        quantization: One or several of the GGUF methods, or `all`; by default `Q4_K_M`.
        output: Where to; by default the run's `export/`, for a checkpoint `export/hf/`.
        name: What the files are called; by default what the run is called.
        adapter_only: Write the adapter as a GGUF LoRA; with a quantization, also its base to load it on.
        options: `GGUFOptions` for GGUF files, `HubOptions` for a checkpoint; either says where to push it.
        progress: Told how far it is.

    Returns:
        What was written.

    Raises:
        MambaSFTError: It cannot be exported, a file failed its check, or another process is writing there.
    """
    from mamba_sft.exporting.hub.push import check_hub
    from mamba_sft.exporting.request import ExportRequest, GGUFOptions, HubOptions

    names = [quantization] if isinstance(quantization, str) else list(quantization or [])
    check_request(run, format, names, adapter_only, options)
    request = ExportRequest(run, names, output, name, progress or (lambda stage, done, total: None))
    if isinstance(options, GGUFOptions):
        request = replace(request, gguf=options, hub=options.hub)
    elif isinstance(options, HubOptions):
        request = replace(request, hub=options)
    check_hub(request.hub)
    with _sole_writer(run, output, format):
        if format == "hf":
            from mamba_sft.exporting.hub.export import export_checkpoint

            return export_checkpoint(request)
        from mamba_sft.exporting.gguf.export import export_adapter, export_model

        return (export_adapter if adapter_only else export_model)(request, ollama=format == "ollama")


def _sole_writer(
    where: Run | str | Path, output: str | Path | None, format: str
) -> AbstractContextManager[None]:
    """Holds the lock of where the files will go; of nothing where nobody has said where to."""
    run = where if isinstance(where, Run) else Run(Path(where))
    of = run if run.recipe.is_file() else None
    if output is None and of is None:
        return nullcontext()
    place = run.export if output is None else Path(output)
    return hold_output(place, "export", of, replaced=format == "hf")


def check_request(
    run: Run | str | Path,
    format: str,
    quantization: Sequence[str],
    adapter_only: bool,
    options: GGUFOptions | HubOptions | None,
) -> None:
    """Refuses what is not there or does not go together, before torch is loaded. Arguments are `export`'s.

    Raises:
        UsageError: There is no such run, format or quantization, or something belongs to another format.
        ModelError: It is a checkpoint of another kind.
        ExportError: What GGUF files need is not installed.
    """
    from mamba_sft.exporting.gguf.names import refuse_unknown
    from mamba_sft.exporting.hub.push import check_push
    from mamba_sft.exporting.request import GGUFOptions, HubOptions

    if format not in FORMATS:
        question = f"; did you mean `{format.lower()}`?" if format.lower() in FORMATS else ""
        raise UsageError(f"no format `{format}`{question}", hint=f"there are {', '.join(FORMATS)}")
    refuse_unknown(quantization)
    if not isinstance(run, Run) and not adapter_only and (Path(run) / "config.json").is_file():
        read_config(Path(run))  # a model of another kind is told before anything is loaded
    else:
        opened = Run.open(run)
        if adapter_only and opened.model.is_dir():
            raise UsageError(
                f"`{opened.path}` has no adapter: it trained all weights", hint="leave `--adapter-only` out"
            )
    if format == "hf" and (quantization or adapter_only or isinstance(options, GGUFOptions)):
        raise UsageError("quantizations and adapters alone are GGUF files", hint="leave `--format hf` out")
    if format != "hf" and isinstance(options, HubOptions):
        raise UsageError("GGUF files are not described by `HubOptions`", hint="give `GGUFOptions(hub=...)`")
    hub = options.hub if isinstance(options, GGUFOptions) else options
    if hub is not None:
        if adapter_only and hub.push_to_hub is not None:
            raise UsageError("an adapter alone is not pushed", hint="leave `--adapter-only` out")
        check_push(hub)
    if format != "hf":
        from mamba_sft.llama_cpp.installed import require_gguf

        require_gguf()

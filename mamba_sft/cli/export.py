"""The verb `export`."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mamba_sft.cli import completing
from mamba_sft.cli.console import Json, err, loading, model_or_newest, out, quiet_loading, write_json
from mamba_sft.errors import UsageError
from mamba_sft.json_lines import python_text
from mamba_sft.wording import size_text, time_text

if TYPE_CHECKING:
    from mamba_sft.exporting.request import Exported, Pushed
    from mamba_sft.run import Run

Exportable = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|MODEL]",
        help="A run, or a checkpoint's directory; default: the newest.",
        autocompletion=completing.models,
    ),
]
Quantization = Annotated[
    list[str] | None,
    typer.Option(
        "--quantization",
        "-q",
        metavar="METHOD",
        help="Q4_K_M, Q8_0, f16, ... or all; may be repeated.",
        autocompletion=completing.quantizations,
    ),
]


Format = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="gguf, ollama (with a Modelfile) or hf.", autocompletion=completing.formats
    ),
]
Output = Annotated[str | None, typer.Option(metavar="DIR", help="Where to; default: the run's `export/`.")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Of the files; default: the run's.")]
AdapterOnly = Annotated[
    bool, typer.Option("--adapter-only", help="The adapter as a GGUF LoRA; with -q its base too.")
]
Imatrix = Annotated[bool, typer.Option("--imatrix", help="Round by an importance matrix: for 2 and 3 bits.")]
EpsilonFix = Annotated[bool, typer.Option(help="Leave ssm_x as llama.cpp's converter does.")]
Verify = Annotated[bool, typer.Option(help="Do not load and compare each file in llama.cpp.")]
Repository = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", "--push", metavar="REPO", help="Push files and model card to `owner/name`."
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make that repository private.")]
Language = Annotated[
    list[str] | None,
    typer.Option(metavar="CODE", help="For the model card; may be repeated; default: en."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes, disk and time; write nothing.")]


def export(
    run: Exportable = None,
    format: Format = "gguf",
    quantization: Quantization = None,
    output: Output = None,
    name: Name = None,
    adapter_only: AdapterOnly = False,
    imatrix: Imatrix = False,
    epsilon_fix: EpsilonFix = True,
    verify: Verify = True,
    push_to_hub: Repository = None,
    private: Private = False,
    language: Language = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Export a run: GGUF files, for Ollama, or a hub checkpoint.

    Example: mamba-sft export runs/quickstart -q Q4_K_M -q Q8_0
    """
    from mamba_sft.exporting.export_run import check_request
    from mamba_sft.exporting.export_run import export as export_run
    from mamba_sft.exporting.hub.push import check_hub
    from mamba_sft.exporting.request import GGUFOptions, HubOptions

    hub = HubOptions(tuple(language or ["en"]), push_to_hub, private)
    options = hub if format == "hf" else GGUFOptions(epsilon_fix, verify, imatrix, hub=hub)
    if language and format != "hf" and push_to_hub is None:
        raise UsageError("`--language` is of a model card: of `--format hf`, or of a push")
    where = model_or_newest(run)
    if dry_run and (format == "hf" or adapter_only):
        raise UsageError("`--dry-run` plans a model's GGUF files; a checkpoint is as large as its base")
    check_request(where, format, quantization or [], adapter_only, options)
    if not dry_run:
        check_hub(hub)
    with loading("torch and transformers"):
        import mamba_sft.exporting.full_model  # noqa: F401  # what every format needs
        from mamba_sft.cli.progress import StageBar

        quiet_loading()
    if dry_run:
        _show_plan(where, quantization or [], output, name, verify, as_json)
        return
    with StageBar(err) as bar:
        done = export_run(
            where,
            format=format,
            quantization=quantization,
            output=output,
            name=name,
            adapter_only=adapter_only,
            options=options,
            progress=bar.update,
        )
    if as_json:
        _write_json(done)
        return
    _show_files(done)
    if done.pushed is not None:
        _show_push(done.pushed)
    _show_next(done, where, format)


def _show_plan(
    where: str | Run,
    quantization: list[str],
    output: str | None,
    name: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    from mamba_sft.exporting.gguf.export import prepare_model
    from mamba_sft.exporting.gguf.timing import checking_seconds, writing_seconds
    from mamba_sft.exporting.request import ExportRequest

    plan = prepare_model(ExportRequest(where, quantization, output, name, lambda stage, done, total: None))
    seconds, check_seconds = writing_seconds(plan), checking_seconds(plan) if verify else None
    if as_json:
        files = [{"file": str(f.path), "method": f.method, "nbytes": f.nbytes} for f in plan.files]
        content = {"files": files, "nbytes": plan.nbytes, "seconds": seconds, "check_seconds": check_seconds}
        write_json(content)
        return
    table = Table(box=None)
    for title in ("file", "size"):
        table.add_column(title, justify="right" if title == "size" else "left")
    for file in plan.files:
        table.add_row(file.path.name, size_text(file.nbytes))
    out.print(table)
    check = f" and {time_text(check_seconds)} to check" if check_seconds else ""
    out.print(f"{size_text(plan.nbytes)} of disk in {plan.output}")
    out.print(f"about {time_text(seconds)} to write{check} on this machine")


def _write_json(done: Exported) -> None:
    from dataclasses import asdict

    write_json(
        {
            "files": [asdict(file) | {"path": str(file.path)} for file in done.files],
            "others": [str(path) for path in done.others],
            "url": done.url,
            "pushed": asdict(done.pushed) if done.pushed is not None else None,
        }
    )


def _show_files(done: Exported) -> None:
    files = done.files
    table = Table(box=None)
    for title in ("file", "size", "KL", "top-1", "answer as the model"):
        table.add_column(title, justify="left" if title == "file" else "right")
    for file in files:
        q = file.quality
        measured = ["not checked"]
        if q is not None:
            measured = [f"{q.kl:.2g}", f"{q.top1:.1%}", f"{q.same_tokens} of {q.answer_tokens} tokens"]
        table.add_row(file.path.name, size_text(file.nbytes), *measured)
    if files:
        err.print(table)
    for file in files:
        if file.quality is not None:
            answer = " ".join(file.quality.answer.split())
            err.print(f"{file.method} answers: {answer}")
    for path in done.paths:
        out.print(str(path))


def _show_push(pushed: Pushed) -> None:
    for what, names in (
        ("sent", pushed.sent),
        ("there already", pushed.kept),
        ("removed, of an earlier export", pushed.removed),
    ):
        if names:
            err.print(f"{what}: {', '.join(names)}", highlight=False, soft_wrap=True)
    out.print(pushed.url)


def _show_next(done: Exported, where: str | Run, format: str) -> None:
    """Prints what to do with what was written, as commands that can be copied."""
    lines = []
    if format == "ollama":
        file = done.files[0]
        model = file.path.name.removesuffix(f".{file.method}.gguf").removesuffix(".base")
        for path in done.others:
            name = re.sub(r"[^\w.-]", "-", model, flags=re.ASCII) + path.suffix.lower().replace(".", ":")
            lines.append(f"next:   ollama create {shlex.quote(name)} -f {shlex.quote(str(path))}")
    if format == "gguf" and done.files and done.files[-1].method != "LoRA":
        lines.append(f"serve:  llama-server -m {shlex.quote(str(done.files[0].path))} --jinja")
    if format == "hf":
        place = python_text(done.directory)
        lines.append(f"load:   AutoModelForCausalLM.from_pretrained({place})")
        if done.pushed is None:
            run = shlex.quote(str(getattr(where, "path", where)))
            lines.append(f"push:   mamba-sft export {run} --format hf --push-to-hub owner/name")
    for line in lines:
        err.print(line, highlight=False, soft_wrap=True, markup=False)

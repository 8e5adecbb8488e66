"""The verb `bench generate`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mamba_sft.cli import completing
from mamba_sft.cli.console import Json, err, model_or_newest, out, write_json
from mamba_sft.cli.measured import OutputFile, machine_line, write_result
from mamba_sft.cli.output_files import check_output_file, write_output
from mamba_sft.errors import UsageError
from mamba_sft.wording import size_text

LENGTHS = "1k,2k,4k,8k,16k,32k,64k,128k"
LONGEST, MOST_ROWS = 1 << 24, 1024
_NUMBER = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE)


def bench_generate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|MODEL]",
            help="A run, model directory or hub id; default: newest.",
            autocompletion=completing.models,
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of the prompts.")] = LENGTHS,
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Prompts read together.")] = "1",
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens decoded for each.")] = 32,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Leave out stock transformers.")] = True,
    peer_seconds: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="When it is stopped.")] = 120,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PLOT.svg", help="Draw the plot into an SVG file too.")
    ] = None,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Measure prefill, decoding and memory over prompt lengths.

    Example: mamba-sft bench generate runs/quickstart --lengths 1k,8k

    The same prompts go to stock transformers, as far as time and memory allow. 1k is 1,024 tokens.
    """
    tokens = numbers(lengths, "--lengths", LONGEST)
    sizes = numbers(batch_sizes, "--batch-sizes", MOST_ROWS)
    check_output_file(plot, ".svg", "--plot")
    check_output_file(output, ".json", "--output")
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.run import refuse_gguf

    if model is not None:
        refuse_gguf(Path(model))  # llama.cpp runs it, which has benchmarks of its own
    place = find_place(model_or_newest(model))
    from mamba_sft.diagnostics.generation_benchmark import measure_generation

    result = measure_generation(
        place, lengths=tokens, batch_sizes=sizes, new_tokens=new_tokens, peer=peer, peer_seconds=peer_seconds
    )
    write_result(result, output)
    if plot is not None:
        from mamba_sft.cli.length_plot import svg_plots

        write_output(svg_plots(result), plot, "--plot")
    if as_json:
        write_json(result)
        return
    for part in rendered(result):
        out.print(part, soft_wrap=not isinstance(part, Table))
    if plot is not None:
        err.print(f"plot: {plot}")


def numbers(text: str, option: str, most: int) -> list[int]:
    """Returns the numbers of a list such as `1k,512`, ascending; k is 1,024.

    Raises:
        UsageError: Something in it is no number from 1 to `most`.
    """
    found = set()
    for word in text.split(","):
        match = _NUMBER.fullmatch(word.strip())
        number = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if not 1 <= number <= most:
            raise UsageError(
                f"`{option} {text}`: `{word}` is no whole number from 1 to {most:,}",
                hint=f"write numbers with commas between them, such as `{option} 1,4`",
            )
        found.add(number)
    return sorted(found)


def rendered(result: dict[str, Any]) -> Iterator[Table | Text | str]:
    """Yields the machine, a table of all lengths, a plot and what is flat, ready to be printed by rich."""
    from mamba_sft.cli.length_plot import terminal_plots

    yield machine_line(result["machine"])
    settings = result["settings"]
    yield f"{settings['model']} in {settings['dtype']}, {settings['new_tokens']} tokens decoded"
    yield ""
    yield _table(result["rows"])
    for line in terminal_plots(result):
        yield Text(line)
    yield ""
    for one in result["flat"]:
        if one["from"] < one["to"]:
            yield _flat(one, "second")
            if "cpu" in result["machine"]:
                yield _flat(one, "cpu_second") + " (in processor time)"
    for one in result["against_peer"]:
        yield _against(one, "second")
        if "cpu" in result["machine"]:
            yield _against(one, "cpu_second") + " (in processor time)"
    if result["peer_ended"]:
        yield f"transformers: {result['peer_ended']}"
    if result["peer_is_base"]:
        yield "transformers: the base alone, without the adapter"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("", "batch", "tokens", "prefill tokens/s", "decode tokens/s", "peak memory")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["of"], f"{row['batch_size']}", f"{row['length']:,}",
            f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_tokens_per_second']:,.1f}",
            size_text(row["peak_bytes"]),
        )  # fmt: skip
    return table


def _against(one: dict[str, Any], unit: str) -> str:
    return (
        f"batch {one['batch_size']}, {one['length']:,} tokens, against transformers: "
        f"prefill {one[f'prefill_tokens_per_{unit}']:.1f} times as fast, "
        f"decoding {one[f'decode_tokens_per_{unit}']:.1f} times, memory {one['peak_bytes']:.2f} times"
    )


def _flat(one: dict[str, Any], unit: str) -> str:
    return (
        f"batch {one['batch_size']}, from {one['from']:,} to {one['to']:,} tokens: "
        f"prefill {one[f'prefill_tokens_per_{unit}']:.2f} times as fast, "
        f"decoding {one[f'decode_tokens_per_{unit}']:.2f} times, memory {one['peak_bytes']:.2f} times"
    )

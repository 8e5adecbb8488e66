"""What the shell offers after a Tab: recipes, fields, runs, models, cards, quantizations. Loads no torch.

A shell asks by running the program, so each answer is looked up when it is asked for and not before. Bash
splits words at `=`, and so does what it hands over: the value of a field then comes as a word of its own.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

Offers = list[tuple[str, str]]
"""What may stand there, each with what it is; shells that show no descriptions leave them out."""

MOST = 200
"""More files than anybody looks through."""


def recipes(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers the built-in recipes, and YAML files here and one directory down."""
    files = [(name, "a file") for name in _files(incomplete, ".yaml", ".yml")]
    return [*builtin(ctx, args, incomplete), *files]


def builtin(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers the built-in recipes."""
    from mamba_sft.recipe.builtin import about_builtin

    return [(name, _short(about)) for name, about in about_builtin().items()]


def overrides(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers the fields of a recipe, and after a field's `=` the words it takes."""
    from mamba_sft.recipe.options import fields

    known = {field.name: field for field in fields()}
    before = list(ctx.params.get("overrides") or [])
    if len(before) > 1 and before[-1] == "=" and before[-2] in known:  # bash
        return [(word, "") for word in known[before[-2]].choices]
    name, equals, _ = incomplete.partition("=")
    if equals and name in known:
        return [(f"{name}={word}", "") for word in known[name].choices]
    return [(f"{name}=", _short(field.about)) for name, field in known.items()]


def runs(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers the runs under `runs/`, the newest first, and any run below what is typed."""
    from mamba_sft.run import Run

    found = [str(run.path) for run in Run.all_under()]
    return [(name, "a run") for name in dict.fromkeys([*found, *_directories(incomplete, "recipe.yaml")])]


def models(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers runs, directories of models, and GGUF files."""
    checkpoints = _directories(incomplete, "config.json")
    files = _files(incomplete, ".gguf") if incomplete else ()
    return [
        *runs(ctx, args, incomplete),
        *((name, "a model") for name in checkpoints),
        *((name, "a GGUF file") for name in files),
    ]


def cards(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers the GPUs that can be planned for."""
    from mamba_sft.planning.gpu_names import GB

    return [(name, f"{size} GB") for name, size in GB.items()]


def quantizations(ctx: Any, args: list[str], incomplete: str) -> Offers:
    """Offers the methods of GGUF files, in small letters to who types small letters."""
    from mamba_sft.exporting.gguf.names import FLOATS, QUANTIZED

    names = ["all", *QUANTIZED, *FLOATS]
    return [(name.lower() if incomplete and incomplete.islower() else name, "") for name in names]


def dtypes() -> list[str]:
    """Offers what a merged model may be stored as."""
    from mamba_sft.merging.request import DTYPE_NAMES

    return sorted(DTYPE_NAMES)


def suites() -> list[str]:
    """Offers what a model can be scored on."""
    from mamba_sft.run import SUITES

    return list(SUITES)


def merge_bases() -> list[str]:
    """Offers what an adapter may be merged into."""
    from mamba_sft.merging.request import ONTO

    return [*ONTO]


def formats() -> list[str]:
    """Offers the formats of an export."""
    from mamba_sft.exporting.export_run import FORMATS

    return [*FORMATS]


def devices() -> list[str]:
    """Offers the devices to run on."""
    from mamba_sft.inference.request import DEVICES

    return [*DEVICES]


def computed_in() -> list[str]:
    """Offers what a model can compute in."""
    from mamba_sft.inference.request import DTYPES

    return [*DTYPES]


def held_as() -> list[str]:
    """Offers how a model's weights can be held."""
    from mamba_sft.inference.request import QUANTIZATIONS

    return [*QUANTIZATIONS]


def _short(text: str) -> str:
    """A description that no shell has to wrap."""
    return shorten(text, 60, placeholder=" ...")


def _files(incomplete: str, *endings: str) -> Iterator[str]:
    start = glob.escape(incomplete)
    found = {
        name
        for pattern in (f"{start}*", f"{start}*/*")
        for ending in endings
        for name in glob.iglob(pattern + ending)
    }
    yield from sorted(found)[:MOST]


def _directories(incomplete: str, mark: str) -> list[str]:
    """Directories that begin with what is typed and hold a certain file; none before anything is typed."""
    start = glob.escape(incomplete)
    found = glob.iglob(f"{start}*/{mark}") if incomplete else iter(())
    return sorted(str(Path(name).parent) for name in found)[:MOST]

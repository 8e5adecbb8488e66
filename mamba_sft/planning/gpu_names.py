"""The names that `--card` takes, how people write them, and which they may have meant. Imports no torch."""

from __future__ import annotations

import re

from mamba_sft.errors import UsageError
from mamba_sft.wording import shown

GB = {
    "t4": 16, "v100-16": 16, "v100-32": 32, "l4": 24, "a10g": 24, "a10": 24, "3090": 24, "4090": 24,
    "5090": 32, "a6000": 48, "l40s": 48, "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 192,
}  # fmt: skip
"""Every name, with the memory that the card is sold with."""

_MAKERS = re.compile(r"nvidia|geforce|tesla|quadro|rtx|gtx")
_BUILDS = re.compile(r"\b(sxm\d?|pcie|nvl|hbm\d\w?)\b")


def gpu_name(text: str) -> str | None:
    """Returns the name that `--card` takes for what somebody wrote, or None: `4090` for `RTX 4090`."""
    name, memory = _parts(text)
    if name in GB:
        return name if memory in (None, GB[name]) else None
    full = f"{name}-{memory}"
    return full if full in GB else None


def known_gpu(text: str) -> str:
    """Returns the name that `--card` takes for what somebody wrote.

    Raises:
        UsageError: There is none of this name; lists those there are.
    """
    name = gpu_name(text)
    if name is not None:
        return name
    close = " or ".join(f"`{one}`" for one in meant_gpus(text))
    question = f"; did you mean {close}?" if close else ""
    raise UsageError(f"no GPU `{shown(text)}` is known{question}", hint="known GPUs: " + ", ".join(GB))


def meant_gpus(text: str) -> list[str]:
    """Returns the cards that an unknown name may mean, never one of another number: no A10 for an A100."""
    name, memory = _parts(text)
    family = [known for known in GB if known.partition("-")[0] == name]
    if family:
        near = [known for known in family if memory and known.endswith(str(memory)[0] + "0")]
        return near or family
    near = [known for known in GB if _differ_in_letters(name, known.partition("-")[0])]
    return near or [known for known in GB if _differ_in_a_digit(name, known)]


def _parts(text: str) -> tuple[str, int | None]:
    """The name without who made it and how it is built, and the memory that was written with it."""
    text = _BUILDS.sub("", _MAKERS.sub("", re.sub(r"[\s_-]+", "-", text.lower()))).strip("-")
    found = re.fullmatch(r"(.*?)-+(\d+)(?:-*gi?b?)?", text) or re.fullmatch(r"(.+?)-*(\d+)gi?b", text)
    return (found[1], int(found[2])) if found else (text, None)


def _differ_in_letters(one: str, other: str) -> bool:
    """Whether one name is the other with letters behind it: `4090ti`, `l40`."""
    short, long = sorted((one, other), key=len)
    return long.startswith(short) and re.fullmatch(r"-?[a-z]+", long[len(short) :]) is not None


def _differ_in_a_digit(one: str, other: str) -> bool:
    """Whether two numbers are the same but for a digit left out."""
    short, long = sorted((one, other), key=len)
    return (
        len(short) >= 3
        and (short + long).isdigit()
        and any(long[:place] + long[place + 1 :] == short for place in range(len(long)))
    )

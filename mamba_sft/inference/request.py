"""What is asked of `generate` and `chat`, checked before torch is loaded: files, and how to run the model."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from mamba_sft.disk import check_writable
from mamba_sft.errors import DataError, UsageError
from mamba_sft.inference.model_places import ModelPlace, no_adapter
from mamba_sft.json_lines import read_json_lines
from mamba_sft.packed_files import is_packed
from mamba_sft.recipe.fields import ModelSection
from mamba_sft.wording import shown

DEVICES = ("auto", "cpu", "cuda")
"""Where a model can run."""
DTYPES: tuple[str, ...] = get_args(ModelSection.model_fields["dtype"].annotation)
"""What numbers it can compute in; `auto` is what the device is good at."""
QUANTIZATIONS: tuple[str, ...] = get_args(ModelSection.model_fields["quantization"].annotation)
"""How its weights can be held."""
_MEANT = {
    "gpu": "cuda", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32",
    "float": "float32", "4bit": "nf4", "8bit": "int8",
}  # fmt: skip
"""What other tools call them."""


@dataclass(frozen=True)
class Running:
    """How a model is held and run; what is None is as a run was trained, or a checkpoint is stored.

    Args:
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
        dtype: What it computes in.
        quantization: How the weights are held.
        compile: Whether `torch.compile` makes the step of one token.

    Raises:
        UsageError: A word that means nothing here.
    """

    device: str = "auto"
    dtype: str | None = None
    quantization: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, words in (("device", DEVICES), ("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            word = getattr(self, name)
            if word is not None and word not in words:
                meant = _MEANT.get(str(word).lower()) or next(
                    iter(get_close_matches(str(word), words, 1)), ""
                )
                raise UsageError(
                    f"`{name}` is {', '.join(words[:-1])} or {words[-1]}, not {shown(word)}",
                    hint=f"did you mean `--{name} {meant}`?" if meant in words else None,
                )

    def check(self, place: ModelPlace, *, compare: bool = False) -> None:
        """Checks that what is at a place can be run so.

        Args:
            place: From `find_place`.
            compare: Whether it is to be compared with its base.

        Raises:
            UsageError: It cannot.
        """
        if compare and self.compile:
            raise UsageError(
                "`--compile` makes the step of one model, and `--compare` asks two", hint="leave one out"
            )
        if place.gguf is None:
            return
        if compare:
            raise no_adapter(place.name)
        fixed = f"`{place.gguf}` is a GGUF file"
        if self.dtype is not None or self.quantization is not None:
            name = "dtype" if self.dtype is not None else "quantization"
            raise UsageError(
                f"{fixed}, whose weights are stored as they are computed with",
                hint=f"leave `--{name}` out; `mamba-sft export RUN -q Q8_0` writes a file of another kind",
            )
        if self.device == "cuda":
            raise UsageError(
                f"{fixed}, which llama.cpp runs on the CPU here",
                hint="leave `--device` out; a llama.cpp of your own runs it on a GPU",
            )
        if self.compile:
            raise UsageError(f"{fixed}, and llama.cpp is compiled already", hint="leave `--compile` out")


def check_files(prompts: Path | None, output: str | Path | None) -> None:
    """Checks the files that `generate` reads and writes.

    Args:
        prompts: The file of prompts, or None where they are no file.
        output: Where answers go, or None where they go to no file.

    Raises:
        DataError: There is no such file of prompts.
        UsageError: Nothing can be written there, or what is there is no file.
    """
    if prompts is not None and not prompts.exists():
        raise DataError(f"no file `{prompts}`", hint="prompts are JSON Lines, or a .txt with one a line")
    if output is not None and Path(output).is_dir():
        raise UsageError(f"the output `{output}` is a directory", hint="for example `answers.jsonl`")
    if output is not None:
        refuse_packed(Path(output))
    if output is not None and Path(output).exists() and not Path(output).is_file():
        raise UsageError(  # the file of answers takes the place of what is there: of `/dev/null`, too
            f"the output `{output}` is a device or a pipe", hint="leave `--output` out to print answers"
        )
    if prompts is not None and output is not None and Path(output).exists() and prompts.samefile(output):
        raise UsageError(f"the output `{output}` is the file of prompts", hint="for example `answers.jsonl`")
    if output is not None and not _may_be_replaced(Path(output)):
        raise UsageError(
            f"the output `{output}` is there and holds no answers",
            hint="give another file with `--output`, or remove this one",
        )
    if output is not None:
        check_writable(Path(output).parent, UsageError, hint="choose another place for `--output`")


def _may_be_replaced(file: Path) -> bool:
    """Whether nothing is lost with a file: it is not there, empty, or begins with an answer."""
    try:
        first = next((row for row in read_json_lines(file)), None)
    except (OSError, DataError):
        return not file.exists()
    return first is None or (isinstance(first.value, dict) and "finish_reason" in first.value)


def check_batch_size(batch_size: int) -> None:
    """Checks how many prompts are answered together.

    Raises:
        UsageError: It is no number of prompts.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"`batch_size` must be at least 1, not {batch_size}")


def refuse_packed(output: Path) -> None:
    """Refuses a name that says that the file is packed: lines are written as they come, and as they are.

    Raises:
        UsageError: It does.
    """
    if is_packed(output):
        raise UsageError(
            f"`{output}` has the name of a packed file, and what is written is not packed",
            hint=f"for example `{output.with_suffix('')}`",
        )


def check_system(system: str | None, *, raw: bool) -> None:
    """Checks the system message that is asked for.

    Args:
        system: It, or None.
        raw: Whether texts are continued as they are.

    Raises:
        UsageError: It would not be read, or is no text.
    """
    if system and raw:
        raise UsageError(
            "`raw` leaves the chat template out, and with it the system message",
            hint="write it into the prompt, or leave one of the two out",
        )
    check_text(system or "", "the system message", UsageError)


def check_text(text: str, what: str, kind: type[UsageError | DataError]) -> None:
    """Checks that a text has whole characters: a shell hands any byte over, and JSON can say half of one.

    Args:
        text: The text.
        what: What to call it.
        kind: What is raised.

    Raises:
        UsageError: It has not, and `kind` says so; or else DataError.
    """
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise kind(
            f"{what}: \\u{ord(half):04x} is half a character (a lone surrogate)", hint="write it in UTF-8"
        )

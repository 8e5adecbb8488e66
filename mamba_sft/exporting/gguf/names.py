"""The names of the GGUF methods, and which was meant by another. Needs neither gguf nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from mamba_sft.errors import UsageError
from mamba_sft.wording import shown

QUANTIZED = (
    "Q2_K", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0",
    "Q4_1", "Q4_K_S", "Q4_K", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip
FLOATS = ("F32", "F16", "BF16")

_OTHERS = {
    "16BIT": "F16", "32BIT": "F32", "4": "Q4_K_M", "4BIT": "Q4_K_M", "8": "Q8_0", "8BIT": "Q8_0",
    "AWQ": "Q4_K_M", "BFLOAT16": "BF16", "FLOAT16": "F16", "FLOAT32": "F32", "FP16": "F16", "FP32": "F32",
    "FP4": "Q4_K_M", "FP8": "Q8_0", "GPTQ": "Q4_K_M", "HALF": "F16", "INT4": "Q4_K_M", "INT8": "Q8_0",
    "MXFP4": "Q4_K_M", "NF4": "Q4_K_M", "Q2": "Q2_K", "Q3": "Q3_K_M", "Q4": "Q4_K_M", "Q5": "Q5_K_M",
    "Q6": "Q6_K", "Q8": "Q8_0",
}  # fmt: skip
"""What other tools call about the same."""


def refuse_unknown(names: Sequence[str]) -> None:
    """Refuses names of no method, whatever the case of their letters; `all` stands for the quantized ones.

    Raises:
        UsageError: A name is not one of them; says which was meant.
    """
    known = ("all", *QUANTIZED, *FLOATS)
    for name in names:
        if name.upper() not in map(str.upper, known):
            if "," in name:
                each = " ".join(f"-q {part.strip()}" for part in name.split(","))
                raise UsageError(f"no quantization `{shown(name)}`", hint=f"one at a time: `{shown(each)}`")
            close = meant_method(name)
            question = f"; did you mean `{close}`?" if close else ""
            there_are = f"there are {', '.join(known)}"
            raise UsageError(f"no quantization `{shown(name)}`{question}", hint=there_are)


def meant_method(name: str) -> str | None:
    """Returns the method that an unknown name means: `Q4_K_M` for `q4-k-m`, `int4` and `Q4_K_XL`; or None."""
    word = "".join(filter(str.isalnum, name.upper()))
    if word in _OTHERS:
        return _OTHERS[word]
    letters = {method.replace("_", ""): method for method in (*QUANTIZED, *FLOATS)}
    same_bits = [short for short, method in letters.items() if _bits(method) == _bits(word)]
    close = get_close_matches(word, sorted(same_bits, key=lambda short: letters[short] != "Q4_K_M"), n=1)
    return letters[close[0]] if close else None


def _bits(name: str) -> str:
    """The first digits of a name, the bits of a weight; another number of them is no slip."""
    digits = "".join(each if each.isdigit() else " " for each in name).split()
    return digits[0] if digits else ""

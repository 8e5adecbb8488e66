"""Launch every Triton kernel as `triton_ops` does, but compile only: for the cards named on the command line.

    python tests/kernels/compile_kernels.py 75 90

No GPU is needed: a stand-in for Triton's driver says which card is there, and the launch ends where the
machine code is. Prints one line of JSON: for each kernel its card, operand type, registers, bytes of stack
(spilled registers land there), the layouts of its state tiles, and the instructions of its innermost loops,
of the float32 pipe and of the special functions among them, and how early their loads are issued.
A process of its own, because Triton decides when a kernel is defined whether to compile or to interpret it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mamba_sft.kernels import autograd, launching, triton_ops

CHANNELS = 8192
FP32 = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2")  # what the float32 pipe takes
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Card:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton remembers by device what it has compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(capability: int, dtype: torch.dtype, states: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """Run both operations and return each kernel launched, with its code and its arguments by name."""
    seen: list[tuple[str, Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        code = run(self, *arguments, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        seen.append((f"{self.__module__.rsplit('_', 1)[1]}.{self.__name__}", code, given))
        return code

    JITFunction.run = compile_only
    driver.set_active(Card(capability))
    triton_ops._capability = lambda x: divmod(capability, 10)
    card = next(card for card in launching.CARDS.values() if card.capability == divmod(capability, 10))
    triton_ops._stride = lambda u, N, wanted: launching.state_stride(card, N, wanted)
    triton_ops._segments = lambda u, *more: (2, 64)
    try:
        scan(dtype, states, trained=False)
        scan(dtype, states, trained=True)
        with torch.no_grad():
            scan(dtype, states, trained=False)
        convolution(dtype)
    finally:
        JITFunction.run = run
    return seen


def scan(dtype: torch.dtype, states: int, trained: bool) -> None:
    """A packed row as the mixer has it, z half of a projection; A, D and the bias trained or frozen."""
    wide = torch.zeros(1, 65, 2 * CHANNELS, dtype=dtype)
    u, z = wide.clone()[..., :CHANNELS].contiguous().requires_grad_(), wide[..., CHANNELS:].requires_grad_()
    dt = torch.zeros(1, 65, CHANNELS, dtype=dtype)
    A = torch.zeros(CHANNELS, states, requires_grad=trained)
    B, C = torch.zeros(2, 1, 65, states, dtype=dtype)
    D, bias = torch.zeros(2, CHANNELS).requires_grad_(trained)
    seq_idx = torch.arange(65)[None] // 10
    y, _ = autograd.selective_scan(triton_ops, u, dt, A, B, C, D, z, bias, True, None, seq_idx)
    if torch.is_grad_enabled():
        y.sum().backward()


def convolution(dtype: torch.dtype) -> None:
    """The first half of a projection, a packed row, a past, and everything trained."""
    x = torch.zeros(1, 65, 2 * CHANNELS, dtype=dtype)[..., :CHANNELS].requires_grad_()
    weight, bias = torch.zeros(CHANNELS, 4, requires_grad=True), torch.zeros(CHANNELS, requires_grad=True)
    past = torch.zeros(1, CHANNELS, 3, dtype=dtype, requires_grad=True)
    seq_idx = torch.arange(65)[None] // 10
    y, _ = autograd.causal_conv1d(triton_ops, x, weight, bias, "silu", past, seq_idx)
    y.sum().backward()


def report(code: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Read registers, stack, layouts and loops from the machine code and the intermediate code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name) if (TOOLS / "nvdisasm").exists() else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    text = code.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", text, re.M))
    states = given.get("GROUP", given.get("STATES", 0))  # of a tile
    tiles = set(re.findall(rf"tensor<{states}x{given.get('BLOCK', 0)}xf32, (#\w+)>", text))
    updates = given.get("STATES", 1) * given.get("BLOCK", 32) // 32 * given.get("WINDOW", 1)
    loops = _innermost_loops(assembly)
    kinds = [[_name(one) for one in loop] for loop in loops]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "layouts": [layouts[tile] for tile in sorted(tiles)],
        "per_update": [round(len(loop) / updates, 2) for loop in loops],
        "fp32": [round(sum(k in FP32 for k in kind) / updates, 2) for kind in kinds],
        "mufu": [round(kind.count("MUFU") / updates, 2) for kind in kinds],
        "lead": [load_lead(loop) for loop in loops],
        "kept": given.get("saved") is not None,
        "window": given.get("WINDOW"),
        "stride": given.get("STRIDE"),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _innermost_loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop without another loop inside: from a label to the branch back."""
    labels: dict[str, int] = {}
    branches, instructions = [], []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,6}\*/\s+(.*?);", line):
            if (target := re.search(r"BRA.*?(\.L_x_\d+)", found[1])) and target[1] in labels:
                branches.append((labels[target[1]], len(instructions)))
            instructions.append(found[1].strip())
    spans = [(first, last) for first, last in branches if last > first]
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [instructions[first : last + 1] for first, last in inner]


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\d+ +", "", instruction).split()[0].split(".")[0]


def load_lead(loop: list[str]) -> list[int]:
    """For every load from global memory in a loop, how many instructions later its value is first used.

    Counted around the loop's end: a value used in the next round has been waited for by all of the rest.
    """
    leads = []
    for at, instruction in enumerate(loop):
        if _name(instruction) != "LDG":
            continue
        register = re.search(r"LDG\S*\s+(R\d+)", instruction)[1]
        after = [*loop[at + 1 :], *loop[:at]]
        used = (n for n, other in enumerate(after, 1) if _reads(other, register))
        leads.append(next(used, len(loop)))
    return sorted(leads)


def _reads(instruction: str, register: str) -> bool:
    operands = re.sub(r"^@!?U?P\d+ +", "", instruction).split(None, 1)[1:]
    if not operands:
        return False
    parts = operands[0].split(",")
    stores = _name(instruction).startswith("ST")  # the first operand of all else is what it writes
    return any(re.search(rf"\b{register}\b", part) for part in parts[not stores :])


def main(capabilities: list[int]) -> None:
    """Compile for the type a card trains in; on the oldest for float32 and other numbers of states too."""
    rows = []
    for capability in capabilities:
        variants = [(torch.float16 if capability < 80 else torch.bfloat16, 16)]
        if capability == 75:
            variants += [(torch.float32, 16), (torch.float16, 1), (torch.float16, 64)]
        for dtype, states in variants:
            done = set()
            for name, code, given in launches(capability, dtype, states):
                if code.hash not in done:
                    done.add(code.hash)
                    row = {"card": capability, "dtype": str(dtype), "states": states, "kernel": name}
                    rows.append(row | {"trained": given.get("dA") is not None} | report(code, given))
    print(json.dumps(rows))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])

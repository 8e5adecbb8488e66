"""Compile every Triton kernel for the cards named on the command line, and print what came out.

    python tests/kernels/compile_kernels.py 75 90

One line of JSON: for each kernel its card, operand type, registers, bytes of stack (spilled registers land
there), the layouts of its state tiles, and the instructions of its innermost loops. A process of its own,
because Triton decides when a kernel is defined whether to compile or to interpret it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mamba_sft.kernels import triton_conv, triton_ops, triton_scan

CHANNELS = 8192
ACTIVATIONS = ("u", "dt", "z", "y", "dy", "du", "ddt", "dz", "x", "dx")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def kernels(capability: int, states: int) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield name, function, constants, and how many state updates a thread makes per pass of the inner
    loop."""
    forward = triton_ops.tile(states, triton_ops.FORWARD_TILE, triton_ops.FORWARD_CHANNELS)
    backward = triton_ops.tile(states, triton_ops.BACKWARD_TILE, triton_ops.BACKWARD_CHANNELS)
    scan = {"N": states, "SOFTPLUS": True}
    per_step = forward["STATES"] * forward["BLOCK"] // 32
    yield "forward", triton_scan.forward, scan | forward | {"entry": None}, per_step
    yield (
        "inference",
        triton_scan.forward,
        scan | forward | dict.fromkeys(("saved", "stops", "begins")),
        per_step,
    )
    yield "segment_states", triton_scan.segment_states, scan | forward, per_step
    yield "segment_gradients", triton_scan.segment_gradients, scan | forward, per_step
    yield "connect", triton_scan.connect, {"N": states, **forward, "REVERSE": True}, 1
    for name, absent in (("backward", ("dA", "dD", "dbias")), ("backward_with_rates", ())):
        window = triton_ops.window(divmod(capability, 10), states, not absent)
        constants = scan | backward | {"WINDOW": window} | dict.fromkeys(absent)
        yield name, triton_scan.backward, constants, backward["STATES"] * backward["BLOCK"] // 32 * window
    conv = {"W": 4, "BLOCK": triton_ops.CONV_CHANNELS, "SILU": True}
    yield "conv_forward", triton_conv.forward, conv, 1
    yield "conv_backward", triton_conv.backward, conv, 1


def compiled(kernel: Any, constants: dict[str, Any], capability: int, dtype: str) -> Any:
    """Compile as the launcher has it done: 16-byte alignment told of, except where the kernel forgoes it."""
    names = kernel.arg_names
    given = {name: CHANNELS for name in names if name.endswith("_row")} | {
        "channels": CHANNELS,
        "z_row": 2 * CHANNELS,
    }
    constants = {name: value for name, value in (given | constants).items() if name in names}
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        parameter = kernel.params[place]
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("length", "segment", "parts", "span") or name.endswith("_batch"):
            signature[name] = "i32"
        elif name in ("stops", "begins"):
            signature[name] = "*i32"
        else:
            signature[name] = f"*{dtype}" if name in ACTIVATIONS else "*fp32"
        specialized = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if specialized and signature[name] != "constexpr":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_ops.COMPILE)


def report(code: Any, updates: int, states: int) -> dict[str, Any]:
    """Read registers, stack, layouts and loops from the machine code and the intermediate code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name) if (TOOLS / "nvdisasm").exists() else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    text = code.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", text, re.M))
    tiles = set(re.findall(rf"tensor<{states}x\d+xf32, (#\w+)>", text))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "layouts": [layouts[tile] for tile in sorted(tiles)],
        "loops": [round(count / updates, 2) for count in _innermost_loops(assembly)],
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _innermost_loops(assembly: str) -> list[int]:
    """Count the instructions of the loops without another loop inside: from a label to the branch back."""
    labels: dict[str, int] = {}
    branches, count = [], 0
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,6}\*/\s+(.*?);", line):
            if (target := re.search(r"BRA.*?(\.L_x_\d+)", instruction[1])) and target[1] in labels:
                branches.append((labels[target[1]], count))
            count += 1
    spans = [(first, last) for first, last in branches if last > first]
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [last - first + 1 for first, last in inner]


def main(capabilities: list[int]) -> None:
    """Compile for the type a card trains in; on the oldest for float32 and other numbers of states too."""
    rows = []
    for capability in capabilities:
        variants = [("fp16" if capability < 80 else "bf16", 16)]
        if capability == 75:
            variants += [("fp32", 16), ("fp16", 1), ("fp16", 64)]
        for dtype, states in variants:
            for name, kernel, constants, updates in kernels(capability, states):
                code = compiled(kernel, constants, capability, dtype)
                row = {"card": capability, "dtype": dtype, "states": states, "kernel": name}
                rows.append(row | report(code, updates, states))
    print(json.dumps(rows))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])

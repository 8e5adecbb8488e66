"""Compiles `device.cpp` against the headers of the torch that is installed, once per machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
COMPILER = os.environ.get("CXX") or "g++"


def compiler() -> str | None:
    """Returns the path of the compiler, or None."""
    return shutil.which(COMPILER)


def build() -> Path:
    """Returns the compiled library; the first call on a machine takes a minute.

    Raises:
        subprocess.CalledProcessError: It does not compile; the compiler's words are on stderr.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), importlib.metadata.version("torch"), str(torch), version,
             sys.version, platform.machine())  # fmt: skip
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba-sft" / "simulated-cuda"
    library = place / f"{key}.so"
    if not library.exists():
        place.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.partial")
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        links = ["-Wl,--no-as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        options = ["-O1", "-std=c++20", "-fPIC", "-shared", "-w"]
        subprocess.run([COMPILER, *options, *includes, str(SOURCE), "-o", str(partial), *links], check=True)
        partial.replace(library)  # two processes may have made it; both made the same
    return library


if __name__ == "__main__":
    print(build())

"""The `gguf` extra: whether what reads and writes GGUF files is installed. Imports nothing heavy."""

from __future__ import annotations

import importlib.util

from mamba_sft.errors import MambaSFTError

INSTALL_HINT = "pip install 'mamba-sft[gguf]'"


def require_gguf(doing: str = "writing GGUF") -> None:
    """Checks that what reads and writes GGUF files is installed.

    Args:
        doing: What it is needed for.

    Raises:
        MambaSFTError: It is not.
    """
    missing = [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise MambaSFTError(
            f"{doing} needs {' and '.join(f'`{name}`' for name in missing)}", hint=INSTALL_HINT
        )

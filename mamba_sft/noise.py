"""Messages of libraries that nobody can act on, dropped before the first of these libraries is imported.

Each is named by its own words: anything else that these libraries have to say is heard.
"""

from __future__ import annotations

import logging
import os
import warnings

DROPPED = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem",
}
"""Logger -> how a message begins that says nothing of importance to anybody here."""

ALIASES = r"`(is_)?gradient_checkpointing` is deprecated"
"""TRL and PEFT still use the old name of a setting of transformers; so does our configuration of TRL, which
has to run with transformers that knows no other."""


def drop_noise() -> None:
    """Drops these messages from now on; called again, it changes nothing."""
    for name in DROPPED:
        logging.getLogger(name).addFilter(_is_wanted)
    warnings.filterwarnings("ignore", message=ALIASES, category=FutureWarning)


def quiet_libraries() -> None:
    """Leaves out what the libraries say at their own level of talk, for a command line or a cell of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    libraries = "(torch|transformers|trl|peft|accelerate|bitsandbytes|datasets).*"
    warnings.filterwarnings("ignore", module=libraries)


def quiet_loading() -> None:
    """Turns off transformers' bar over tensors, which says little and draws over ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(DROPPED[record.name])

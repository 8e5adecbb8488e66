"""Messages of libraries that nobody can act on, dropped before the first of these libraries is imported.

Each is named by its own words: anything else that these libraries have to say is heard.
"""

from __future__ import annotations

import logging
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


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(DROPPED[record.name])

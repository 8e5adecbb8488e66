"""What nobody can act on is not said, what somebody can is."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from mamba_sft.noise import DROPPED, drop_noise

# In a fresh interpreter: is the filter there when bitsandbytes begins to be imported, whoever imports it?
PROBE = """
import logging, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            filters = logging.getLogger("bitsandbytes.backends.cpu.ops").filters
            print("filtered" if filters else "NOT FILTERED")
        return None

sys.meta_path.insert(0, Watch())
{code}
"""


@pytest.mark.parametrize(
    "code",
    [
        "import mamba_sft.training.fine_tuning, mamba_sft.merging.merge_run",
        "import mamba_sft.inference.chat_model",
        "import mamba_sft.model.quantization as q; q.bitsandbytes_config; import bitsandbytes",
        "import mamba_sft.training.trainer",
        "import mamba_sft.diagnostics.diagnosis, mamba_sft.model.adapter",
    ],
)
def test_the_filter_is_there_before_bitsandbytes(code: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True
    )
    assert set(found.stdout.split("\n")) - {""} == {"filtered"}
    assert "gemm_4bit" not in found.stderr


def test_only_these_messages_are_dropped() -> None:
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    drop_noise()
    for name, beginning in DROPPED.items():
        logger = logging.getLogger(name)
        logger.addHandler(listener)  # the library's own root need not hand records on
        logger.warning(beginning + ": %s", "why")
        logger.warning("something else: %s", "why")
        logger.removeHandler(listener)
        assert logger.filters.count(logger.filters[0]) == 1
    assert heard == ["something else: why"] * len(DROPPED)


def test_only_the_old_name_of_a_setting_is_dropped() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        drop_noise()
        for name in ("is_gradient_checkpointing", "gradient_checkpointing", "other"):
            warnings.warn(f"`{name}` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in heard] == ["`other` is deprecated and will be removed"]

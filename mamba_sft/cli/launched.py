"""What a process does that a launcher started: it leaves a report of what ended it, and does not outlive it.

torchrun names a file in which a process says how it failed (`TORCHELASTIC_ERROR_FILE`), and shows what is in
it; the form is that of `torch.distributed.elastic.multiprocessing.errors`. What `train --processes` needs
beyond that stands beside it, under `mamba_sft`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from mamba_sft.errors import MambaSFTError
from mamba_sft.processes import LAUNCHED

_LOOKS = 1.0
"""Seconds between two looks at whether the launcher still runs."""
_LEAVES = 15.0
"""Seconds that a process takes to end, at most, when it has said why."""


def leave_report(error: BaseException) -> bool:
    """Writes what ended this process where its launcher looks; returns whether our launcher tells it.

    Args:
        error: Of a bug, whose traceback goes with it, or expected.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return False
    report = _report(error)
    told = report["message"] + (f"\nhint: {report['hint']}" if report["hint"] else "")
    trace = {"py_callstack": report["traceback"] or told, "timestamp": str(int(report["at"]))}
    report = {"message": {"message": told, "extraInfo": trace}, "mamba_sft": report}
    try:
        Path(place).write_text(json.dumps(report), encoding="utf-8")
    except OSError:
        return False
    if LAUNCHED not in os.environ:
        return False
    faulthandler.dump_traceback_later(_LEAVES, exit=True)  # a process group that waits for others may not end
    return True


def _report(error: BaseException) -> dict[str, Any]:
    report = {"heading": "error", "hint": None, "exit_code": 1, "traceback": "", "at": time.time()}
    if isinstance(error, MambaSFTError):
        own = {"heading": error.heading, "hint": error.hint, "exit_code": error.exit_code}
        return report | own | {"message": error.message}
    if isinstance(error, KeyboardInterrupt):
        return report | {"heading": "stopped", "exit_code": 130, "message": "by a signal"}
    trace = "".join(traceback.format_exception(error))
    return report | {"message": f"{type(error).__name__}: {error}", "traceback": trace}


def stop_with_launcher(grace_seconds: float) -> None:
    """Stops this process, with a resume point, when the launcher that started it is gone.

    Args:
        grace_seconds: How long it may take; then it is ended as it is.
    """
    if LAUNCHED not in os.environ:
        return
    faulthandler.enable()  # a crash in a library says where it was, in what the launcher shows
    watch = threading.Thread(target=_watch, args=(os.getppid(), grace_seconds), daemon=True)
    watch.start()


def _watch(launcher: int, grace_seconds: float) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os._exit(1)

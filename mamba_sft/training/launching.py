"""Many processes for one run: torchrun's agent starts, watches and stops them, and we say what happened.

`train --processes` calls torch's own `elastic_launch` in this process instead of `torchrun` in another one:
a process that failed comes back as an object, with its rank, exit code and report, and a signal is passed on
only once. The agent gives each process its own session, so that Ctrl-C reaches only the agent, which passes
it on. When one process fails, it stops the others (SIGTERM, and SIGKILL 30 seconds later). Each process
leaves a report of what ended it in the file that torch names (`cli/launched.py`); of these the one is told
that was first to fail, because what the others say is only that they lost it.

The arguments and the recipe are checked before any process is started, and without torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import join, quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import TrainingError, UsageError
from mamba_sft.processes import LAUNCHED, is_one_of_many
from mamba_sft.run import Run
from mamba_sft.training.resuming import newest_resume_point
from mamba_sft.wording import count_text, first_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

JOIN_SECONDS = 900
"""How long the machines wait for each other at the start; torchrun's own default."""
SPARE_SECONDS = 30
"""Between the time that a resume point may take and the SIGKILL of processes that are still there."""
AGENT_SECONDS = 30
"""What torch before 2.12 gives processes between the signal and SIGKILL, whatever it is asked."""
SAME_TIME = 10
"""Seconds after the first failure in which others are seen that the agent itself did not cause."""
LAST_LINES = 20
"""Of the output of a process that left no report."""


@dataclass(frozen=True)
class Launch:
    """The processes that were asked for.

    Args:
        processes: On each machine.
        nodes: Machines, each of which gets the same command but for `rank`.
        rank: Which of them this is, from 0.
        host: Where the processes meet: the machine of rank 0. Empty with one machine.
        port: The same; 0 takes any.
    """

    processes: int
    nodes: int = 1
    rank: int = 0
    host: str = ""
    port: int = 0

    @property
    def options(self) -> list[str]:
        """The words of the command line that ask for it, on any machine."""
        words = ["--processes", str(self.processes)]
        if self.nodes > 1:
            words += ["--nodes", str(self.nodes), "--rank", str(self.rank)]
            words += ["--master", f"[{self.host}]:{self.port}" if ":" in self.host else self.master]
        return words

    @property
    def master(self) -> str:
        """Host and port as torchrun takes them."""
        return f"{self.host}:{self.port}"


class LaunchedError(TrainingError):
    """What ended the processes, told once.

    Args:
        message: As of any error.
        hint: As of any error.
        exit_code: What the command ends with.
        heading: `error`, or `stopped` after a signal.
    """

    def __init__(self, message: str, hint: str | None, exit_code: int = 1, heading: str = "error"):
        super().__init__(message, hint)
        self.exit_code = exit_code
        self.heading = heading


def asked_launch(
    processes: int | None, nodes: int | None, rank: int | None, master: str | None
) -> Launch | None:
    """Returns what `--processes`, `--nodes`, `--rank` and `--master` ask for, None: nothing.

    Raises:
        UsageError: They do not go together, or torchrun started this process already.
    """
    more = {"--nodes": nodes, "--rank": rank, "--master": master}
    if processes is None:
        for option, value in more.items():
            if value is not None:
                raise UsageError(
                    f"`{option}` goes with `--processes`", hint="say how many run on each machine"
                )
        return None
    if is_one_of_many():
        raise UsageError(
            "`--processes` starts torchrun, and a launcher has started this process already (RANK or the "
            "like is set)",
            hint="leave `--processes` out under `torchrun`, `accelerate launch` or MPI, or unset RANK",
        )
    if processes < 1:
        raise UsageError(
            f"`--processes` takes at least one, not {processes}", hint="say how many GPUs this machine has"
        )
    if nodes is None:
        if master is not None or rank is not None:
            raise UsageError(
                "`--rank` and `--master` are for several machines", hint="say how many: `--nodes 2`"
            )
        return Launch(processes)
    return _several_nodes(processes, nodes, rank, master)


def _several_nodes(processes: int, nodes: int, rank: int | None, master: str | None) -> Launch:
    if nodes < 1:
        raise UsageError(f"`--nodes` takes at least one, not {nodes}", hint="say how many machines there are")
    if nodes == 1 and not rank:  # a job on one machine: it meets nobody
        return Launch(processes)
    if master is None:
        raise UsageError(
            f"`--nodes {nodes}` needs `--master`",
            hint="HOST:PORT of the machine of rank 0, such as `--master node0:29500`, the same on all",
        )
    if rank is None or not 0 <= rank < nodes:
        told = f"`--nodes {nodes}` " + ("needs `--rank`" if rank is None else f"and `--rank {rank}`")
        raise UsageError(told, hint=f"each machine has its own, from 0 to {nodes - 1}")
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^\s:/\[\]]+)):(\d{1,5})", master)
    if found is None or not 0 < int(found[3]) < 1 << 16:
        raise UsageError(
            f"`--master {master}` is no HOST:PORT", hint="such as `--master node0:29500` or `[fd00::1]:29500`"
        )
    return Launch(processes, nodes, rank, found[1] or found[2], int(found[3]))


def refuse_impossible(asked: Launch, grace_seconds: float) -> None:
    """Checks what depends on this machine, its network and its torch.

    Args:
        asked: The processes.
        grace_seconds: `train.grace_seconds`.

    Raises:
        UsageError: More processes than GPUs, a host that is not known, or a longer grace than torch gives.
    """
    import torch
    from torch.distributed.launcher.api import LaunchConfig

    if asked.nodes > 1:
        try:
            socket.getaddrinfo(asked.host, asked.port)
        except OSError as error:
            raise UsageError(
                f"`--master {asked.master}`: `{asked.host}` is not known here: {error.strerror}",
                hint="the name or the address of the machine of rank 0, as this one reaches it",
            ) from None
    gpus = torch.cuda.device_count()
    if 0 < gpus < asked.processes:
        raise UsageError(
            f"`--processes {asked.processes}`, and there {'is' if gpus == 1 else 'are'} "
            f"{count_text(gpus, 'GPU')} here",
            hint=f"one process for each GPU: `--processes {gpus}`; CUDA_VISIBLE_DEVICES may hide others",
        )
    if grace_seconds > AGENT_SECONDS and not _has_timeout(LaunchConfig):
        raise UsageError(
            f"`train.grace_seconds: {grace_seconds:g}`: torch {torch.__version__} ends its processes "
            f"{AGENT_SECONDS} seconds after a signal",
            hint=f"install torch 2.12 or newer, or set it to {AGENT_SECONDS} at most",
        )


def launch(asked: Launch, words: Sequence[str], run: Run, grace_seconds: float) -> None:
    """Runs `mamba-sft WORDS` in all processes of this machine, and returns when all of them are done.

    Args:
        asked: The processes.
        words: The command line without `--processes` and what goes with it.
        run: Where they write.
        grace_seconds: `train.grace_seconds`: what they are given after a signal, and some seconds more.

    Raises:
        LaunchedError: One failed, or a signal stopped them; told as that process told it.
        TrainingError: The machines did not find each other.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with TemporaryDirectory(prefix="mamba-sft-") as place, _as_launcher(asked, words):
        ended = _Ended(asked, run, Path(place))
        try:
            elastic_launch(_config(asked, place, grace_seconds), sys.executable)("-m", "mamba_sft", *words)
        except ChildFailedError as error:
            raise ended.by_failure(error.failures) from None
        except SignalException as error:
            raise ended.by_signal(error.sigval) from None
        except (RuntimeError, OSError, TimeoutError) as error:  # what the store and the rendezvous raise
            if asked.nodes == 1:
                raise
            raise TrainingError(
                f"the {asked.nodes} machines did not meet at `{asked.master}`: {first_line(error)}",
                hint=f"each of them needs the same command within {JOIN_SECONDS} seconds, with `--rank` 0 on "
                f"the machine that is called `{asked.host}`, where port {asked.port} is free and reachable",
            ) from None


def _config(asked: Launch, place: str, grace_seconds: float) -> Any:
    """What torchrun's agent needs to know, as `torchrun --standalone` or `--master-addr` would set it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    alone = asked.nodes == 1
    meeting: dict[str, Any] = {"timeout": JOIN_SECONDS}
    if not alone:
        meeting["rank"] = asked.rank
    timeout = {"shutdown_timeout": int(grace_seconds + SPARE_SECONDS)} if _has_timeout(LaunchConfig) else {}
    return LaunchConfig(
        min_nodes=asked.nodes,
        max_nodes=asked.nodes,
        nproc_per_node=asked.processes,
        run_id=uuid.uuid4().hex if alone else "mamba-sft",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else asked.master,
        rdzv_configs=meeting,
        local_addr="localhost" if alone else None,
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT",  # a hang-up stays what it is, so that `nohup` means something
        logs_specs=DefaultLogsSpecs(place, redirects=dict.fromkeys(range(1, asked.processes), Std.ALL)),
        **timeout,
    )


def _has_timeout(config: type) -> bool:
    return "shutdown_timeout" in {field.name for field in fields(config)}


@contextmanager
def _as_launcher(asked: Launch, words: Sequence[str]) -> Iterator[None]:
    """What the processes find in their environment, and how this process behaves while they run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // asked.processes))
    ours = {LAUNCHED: join(["mamba-sft", *words, *asked.options])}
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        ours[name] = os.environ.get(name, threads)
    before = {name: os.environ.get(name) for name in (*ours, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ.update(ours)
    silent = logging.root.manager.disable
    logging.disable(max(silent, logging.ERROR))  # the agent's own account of what we tell in one message
    try:
        yield
    finally:
        logging.disable(silent)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Ended:
    """Says what ended the processes, from their exit codes and the reports they left.

    Args:
        asked: The processes.
        run: Where they wrote.
        place: Where their reports and their output are.
    """

    def __init__(self, asked: Launch, run: Run, place: Path):
        self.asked = asked
        self.run = run
        self.place = place

    def by_signal(self, number: signal.Signals) -> LaunchedError:
        """Returns what to tell after a signal to this process, which was passed on to all."""
        reports = self._reports()
        failed = [rank for rank, one in reports.items() if one.get("heading") != "stopped"]
        if failed:
            return self._reported(failed[0], reports)
        if reports:
            return self._reported(min(reports), reports)
        return LaunchedError(f"by {number.name}", self._again(), 130, "stopped")

    def by_failure(self, failures: dict[int, ProcessFailure]) -> LaunchedError:
        """Returns what to tell when a process ended with anything but 0.

        Args:
            failures: By global rank, in the order in which the agent saw them. It stops the others at the
                first, and then these have failed too.
        """
        reports, base = self._reports(), self.asked.rank * self.asked.processes
        first = min(failure.timestamp for failure in failures.values())
        for rank, failure in failures.items():
            own = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and rank - base not in reports
            if own and failure.timestamp - first < SAME_TIME:
                return self._killed(rank, failure)
        told = [rank for rank in reports if reports[rank].get("heading") != "stopped"]
        if told:
            return self._reported(min(told, key=lambda rank: reports[rank].get("at", time.time())), reports)
        for rank, failure in failures.items():
            if rank - base not in reports and failure.exitcode not in (130, -signal.SIGTERM):
                return self._killed(rank, failure)
        if reports:
            return self._reported(min(reports), reports)
        return LaunchedError("by a signal to one of the processes", self._again(), 130, "stopped")

    def _reports(self) -> dict[int, dict[str, Any]]:
        """What the processes left, by local rank."""
        found = {}
        for path in self.place.rglob("error.json"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # cut off by SIGKILL
                continue
            found[int(path.parent.name)] = content.get("mamba_sft", {})
        return dict(sorted(found.items()))

    def _reported(self, local: int, reports: dict[int, dict[str, Any]]) -> LaunchedError:
        """Tells what a process reported, with its rank where not all say the same."""
        report = reports[local]
        message, heading = report["message"], report["heading"]
        if heading == "stopped":
            return LaunchedError(message, self._again() or report["hint"], report["exit_code"], heading)
        rank = self.asked.rank * self.asked.processes + local
        if trace := report.get("traceback"):
            message = f"rank {rank} failed, which ended the run: {message}\n{trace.rstrip()}"
        elif len({one.get("message") for one in reports.values()}) > 1 or len(reports) < self.asked.processes:
            message = f"rank {rank}: {message}"
        hint = report["hint"] or (self._again() if trace else None)
        return LaunchedError(message, hint, report["exit_code"])

    def _killed(self, rank: int, failure: ProcessFailure) -> LaunchedError:
        """Tells of a process that could leave no report."""
        code = failure.exitcode
        by = f"was killed by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        message = f"rank {rank} (process {failure.pid}) {by}, which ended the run; it left no traceback"
        if lines := self._last_lines(rank):
            message += ", and last wrote:\n" + "\n".join(f"  {line}" for line in lines)
        hints = [hint for hint in (self._again(),) if hint]
        if code == -signal.SIGKILL:
            hints.append("if nobody killed it, the system did, for want of memory: see `dmesg`")
        return LaunchedError(message, "; ".join(hints) or None)

    def _last_lines(self, rank: int) -> list[str]:
        local = rank - self.asked.rank * self.asked.processes
        for path in self.place.rglob(f"{local}/stderr.log"):
            return path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return []

    def _again(self) -> str | None:
        if newest_resume_point(self.run) is None:
            return None
        words = " ".join(self.asked.options)
        return f"continue with `mamba-sft train {quote(str(self.run.recipe))} {words} --resume`"

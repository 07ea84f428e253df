"""Running a trainer as a child process that never outlives us."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_app.core.stage import die_with_parent

KEPT_LINES = 2000
GRACE_SEC = 10  # between asking a trainer to end and ending it


@dataclass(frozen=True)
class Finished:
    """A child that ended by itself; `lines` are the last KEPT_LINES of what it printed."""

    code: int
    lines: list[str]


def run_child(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Finished:
    """Run a command in a session of its own, its output shown on stderr as it comes.

    Whatever ends us ends the child and all that it started. Against SIGKILL of ours only the child
    itself is covered (Linux).

    Args:
        folder: to run it in; None for the current one.
    """
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    # What the child started may hold its output open for ever, and our reading of it would never end.
    threading.Thread(target=_sweep_up_after, args=(process,), daemon=True).start()
    try:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)
        code = process.wait()
    finally:
        _end_session(process)
    return Finished(code, list(lines))


def _sweep_up_after(process: subprocess.Popen[str]) -> None:
    """Wait for a child and end what it leaves behind."""
    process.wait()
    _end_session(process)


def _end_session(process: subprocess.Popen[str]) -> None:
    """End what still runs of a child's session, politely first."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=GRACE_SEC)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

"""How far a labelling run is: a live line on a terminal, a line every so often in a log."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as LiveProgress

REPORT_EVERY_SEC = 15.0
TELLING_SHARE = 0.25  # of the answers, from which their pace is even; before, a whole batch is under way


class Progress:
    """Done of all, tokens per second and time left, on stderr and in a file of its own.

    Args:
        label: what is being done; empty says nothing at all.
        total: how many answers there will be; None where that is not known.
        log_path: a file that gets the lines too, with the time before each.
    """

    def __init__(self, label: str, total: int | None, log_path: str | Path | None = None) -> None:
        self.label, self.total, self.log_path = label, total, log_path
        self.done = self.asked = self.tokens = 0
        self._lock = threading.Lock()  # an engine may pull prompts, and so count, in a thread of its own
        self._began = self._reported = time.monotonic()
        self._done_before = 0
        self._live: LiveProgress | None = None

    def __enter__(self) -> "Progress":
        if self.label and sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}")
            self._live = LiveProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(self.label, total=self.total, line="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if kind is None and self.done:
            self.say(self._outcome())

    def start(self) -> None:
        """Begin to measure speed, if nothing was asked yet: what was done before came from the store."""
        if not self.asked:
            self._began, self._done_before = time.monotonic(), self.done

    def add(self, done: int, asked: int = 0, tokens: int = 0) -> None:
        """Count prompts that have their answer now, and of those the ones that were asked for it."""
        with self._lock:
            self.done += done
            self.asked += asked
            self.tokens += tokens
            now = time.monotonic()
            due = now - self._reported > REPORT_EVERY_SEC
            self._reported = now if due else self._reported
        if self._live:
            self._live.update(self._task, completed=self.done, line=self._line())
        if due:
            self.say(self._line(), live=True)

    def say(self, text: str, live: bool = False) -> None:
        """Write a line to stderr and to the log; with `live`, not where the terminal shows it already."""
        if self.label:
            tell(f"{self.label}: {text}", self.log_path, to_stderr=not (live and self._live))

    def _line(self) -> str:
        of_all = f"{self.done} of {self.total}" if self.total is not None else f"{self.done}"
        seconds = time.monotonic() - self._began
        parts = [of_all, f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s"]
        new = self.done - self._done_before
        if self.total is not None and new > 0 and new >= TELLING_SHARE * (self.total - self._done_before):
            parts.append(f"about {_duration(seconds / new * (self.total - self.done))} left")
        return ", ".join([*parts, f"{self.done - self.asked} from the store"])

    def _outcome(self) -> str:
        stored = f"{self.done - self.asked} from the store"
        if not self.asked:
            return f"{self.done} answers, {stored}"
        seconds = time.monotonic() - self._began
        rate = self.tokens / max(seconds, 1e-9)
        speed = f"{self.tokens} tokens in {_duration(seconds)}, {rate:.0f} tokens/s"
        return f"{self.done} answers, {self.asked} asked ({speed}), {stored}"


def tell(line: str, log_path: str | Path | None = None, to_stderr: bool = True) -> None:
    """Write a line to stderr and, with the time before it, to a log."""
    if to_stderr:
        print(line, file=sys.stderr, flush=True)
    if log_path is not None:
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        with Path(log_path).open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""The console command as a process of its own, through pipes or in a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from distill_app.cli import main

COMMAND = [sys.executable, "-m", "distill_app"]


def heed_interrupts() -> None:
    """Undo what a shell's background job starts with and its children inherit: it ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def distill(*arguments: str, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `distill` with text piped in."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, input=stdin)


def distill_here(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `distill` in this process, which has torch already; its signals and pipes are the test's."""
    out, errors, code = io.StringIO(), io.StringIO(), None
    with (
        mock.patch.object(sys, "argv", ["distill", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


class Terminal:
    """`distill` in a terminal of its own, whose keys the test presses."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self.process, self.screen = pty.fork()
        if self.process == 0:
            heed_interrupts()
            os.environ["TERM"] = "dumb"  # readline then writes no sequences of its own
            os.execv(COMMAND[0], [*COMMAND, *arguments])

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def until(self, pattern: str, timeout_sec: float = 300) -> re.Match[str]:
        """Read on until the screen shows a pattern, and return it; what stood before it is used up."""
        deadline = time.monotonic() + timeout_sec
        while not (found := re.search(pattern, self.shown)):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.screen], [], [], left)[0], (
                f"no {pattern} in {self.shown!r}"
            )
            self.shown += self._read()
        self.shown = self.shown[found.end() :]
        return found

    def exit_code(self) -> int:
        """Wait for the end."""
        while piece := self._read():
            self.shown += piece
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def _read(self) -> str:
        try:
            return os.read(self.screen, 4096).decode(errors="replace")
        except OSError:  # Linux's way to say that nobody writes any more
            return ""

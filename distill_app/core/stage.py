"""The frame of a stage: errors in one line, exit code 1, no orphan left behind."""

import ctypes
import errno
import signal
import sys
from collections.abc import Callable

from distill_app.core.errors import EngineGone, TrainingError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; report an expected error as one line on stderr and exit with 1.

    Expected are bad data and params (ValueError), paths (OSError), missing packages (ImportError), failed
    trainers (TrainingError) and engines (EngineGone). Anything else is a defect of ours and keeps its
    traceback. SIGTERM ends a stage as Ctrl-C does, so that what is half-written goes.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    die_with_parent()
    sys.exit(report_errors(main))


def report_errors(main: Callable[[], None]) -> int:
    """Run `main`; return 0, or 1 after an expected error and 130 after Ctrl-C, each told in one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left, run the same command again", file=sys.stderr)
        return 130
    except (ValueError, OSError, TrainingError, EngineGone, ImportError) as err:
        print(f"error: {one_line(err)}", file=sys.stderr)
        return 1
    return 0


def one_line(err: BaseException) -> str:
    """Return an error's text as a single line."""
    if isinstance(err, OSError) and err.errno == errno.ENOSPC:
        return f"{err.filename or 'disk'}: no space left on device; free some space and run again"
    return " ".join(str(err).split()) or type(err).__name__


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends, so that a killed `dvc` leaves no trainer (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

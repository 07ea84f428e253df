"""Scratch folders that do not outlive their run, and errors of one line that name the file at fault."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SCRATCH = "distill-scratch-"  # how the names of scratch folders begin


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder under TMPDIR, after clearing those that killed runs have left."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(left, fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as held:
        folder = None
        while folder is None or not folder.exists():  # cleared by another run before it was locked
            folder = Path(
                held.enter_context(tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True))
            )
            with contextlib.suppress(OSError):  # a disk without locks, so nothing will be cleared on it
                held.enter_context(_locked(folder))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Hold the lock of a folder, which goes with this process however that ends.

    Raises:
        OSError: there are no locks, or with LOCK_NB: another holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_errors(file: Path) -> Iterator[None]:
    """Turn what reading a file raises into one line that begins with its path.

    Raises:
        FileNotFoundError: the file has gone since it was found.
        OSError: the disk for scratch files is full.
        ValueError: the file cannot be read.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError) as err:
        if getattr(err, "errno", None) in (errno.ENOSPC, errno.EFBIG):
            raise OSError(errno.ENOSPC, "no space left on device", tempfile.gettempdir()) from err
        if not file.exists():
            raise FileNotFoundError(
                f"{file}: the file has gone while it was read; bring it back and run again"
            ) from err
        raise ValueError(f"{file}: cannot be read ({told(err)}); fix the file or fetch it again") from err


def told(err: BaseException) -> str:
    """Return an error's kind and its text as one line of bounded length."""
    return f"{type(err).__name__}: {shortened(str(err))}"


def named(columns: Iterable[str]) -> str:
    """Return column names as an error lists them: one line of bounded length."""
    return shortened(", ".join(columns)) or "none"


def shortened(text: str) -> str:
    """Return a text as one line of at most 300 characters."""
    line = " ".join(text.split())
    return f"{line[:300]} ..." if len(line) > 300 else line

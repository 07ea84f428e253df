"""DuckDB: bounded memory and its errors in one line, with the file that is at fault."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

MEMORY_LIMIT = "448MiB"  # beyond it DuckDB writes to the scratch folder
MAX_THREADS = 4  # each holds row groups of its own in memory
SCRATCH = "distill-scratch-"  # how the names of scratch folders begin
PATTERN = re.compile(r"[*?\[\]]")  # DuckDB takes such a path for a pattern
ADVICE = re.compile(
    " Possible fixes: | Possible solutions: | Possible Solution: | Try auto-detecting | LINE 1: "
)
DEVICE_FULL = re.compile("no space left on device", re.IGNORECASE)


@dataclass(frozen=True)
class Database:
    """A DuckDB connection and a scratch folder that goes with it."""

    connection: Any  # duckdb.DuckDBPyConnection; not imported here, so that this module stays light
    scratch: Path

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run SQL and return all its rows."""
        return self.connection.execute(sql, list(values)).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """Run SQL and return the first value of its first row."""
        return self.rows(sql, values)[0][0]

    @contextlib.contextmanager
    def reading(self, found: "pa.Table | pa.RecordBatchReader") -> Iterator[None]:
        """Let SQL read Arrow data as `found`, a reader once."""
        self.connection.register("found", found)
        try:
            yield
        finally:
            self.connection.unregister("found")

    def over(self, found: "pa.Table | pa.RecordBatchReader", sql: str) -> list[tuple[Any, ...]]:
        """Run SQL that reads Arrow data as `found`, and return all its rows."""
        with self.reading(found):
            return self.rows(sql)


@contextlib.contextmanager
def open_database(threads: int | None = None) -> Iterator[Database]:
    """Give a database in memory whose overflow, and our scratch files, lie under TMPDIR.

    Args:
        threads: None takes the machine's, at most MAX_THREADS. Results do not depend on it.
    """
    import duckdb

    with _scratch_folder() as folder:
        config: dict[str, Any] = {
            "memory_limit": MEMORY_LIMIT,
            "threads": threads or min(os.cpu_count() or 1, MAX_THREADS),
            "temp_directory": str(folder / "overflow"),
            "preserve_insertion_order": True,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        connection = duckdb.connect(config=config)
        try:
            yield Database(connection, folder)
        finally:
            connection.close()


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
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


def literal(value: object) -> str:
    """Return a text, number or list as SQL writes it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace("'", "''")
    return f"'{text}'"


@contextlib.contextmanager
def named_errors(where: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Turn the engine's errors into ours: one line that begins with the file at fault, if it is known.

    Raises:
        FileNotFoundError: a file has gone since it was found.
        OSError: the disk is full, or memory too small.
        ValueError: a file that cannot be read.
    """
    import duckdb
    import pyarrow as pa

    try:
        yield
    except duckdb.OutOfMemoryException as err:
        raise OSError(
            f"{where}: too little memory for its longest texts, or disk under TMPDIR ({told(err)});"
            " free some space, or take those rows out"
        ) from err
    except (duckdb.Error, pa.ArrowException, OSError, UnicodeDecodeError) as err:
        if DEVICE_FULL.search(str(err)) or getattr(err, "errno", None) == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "no space left on device", tempfile.gettempdir()) from err
        at_fault = next((str(file) for file in files if str(file) in str(err)), None)
        at_fault = at_fault or next((str(file) for file in files if not _is_whole(file)), where)
        if not Path(at_fault).exists() and at_fault != where:
            raise FileNotFoundError(
                f"{at_fault}: the file has gone while it was read; bring it back and run again"
            ) from err
        raise ValueError(
            f"{at_fault}: cannot be read ({told(err)}); mend the file or fetch it again"
        ) from err


def _is_whole(file: Path) -> bool:
    """Read a Parquet file from end to end."""
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(1024):
            batch.validate(full=True)
    except Exception:  # whatever the decoders raise, the file is not whole
        return False
    return True


def told(err: BaseException) -> str:
    """Return an error's kind and its text as one line of bounded length."""
    text = " ".join(str(err).split())
    text = ADVICE.split(text)[0].removeprefix("Invalid Input Error: ").strip()
    return f"{type(err).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def named(columns: Iterable[str]) -> str:
    """Return column names as an error lists them: one line of bounded length."""
    text = " ".join(", ".join(columns).split())
    return f"{text[:300]} ..." if len(text) > 300 else text or "none"

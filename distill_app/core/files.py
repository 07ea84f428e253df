"""Reading and writing: JSON and record files, always whole or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from distill_app.core.errors import EmptyDataError

Record = dict[str, str]
RECORD_FIELDS = ("instruction", "input", "output")
PARQUET_ROWS = 4096  # held in memory at a time


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what the JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON or not UTF-8; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run the stage that writes it, or mend the path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: byte {err.start} is not UTF-8; save the file as UTF-8") from err
    except json.JSONDecodeError as err:
        raise ValueError(
            f"{path}: line {err.lineno}, column {err.colno}: not JSON ({err.msg}); mend that line"
        ) from err


def save_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as JSON in UTF-8, non-ASCII characters as they are; the old file stays until done.

    Raises:
        ValueError: the data holds text that UTF-8 cannot hold (a lone surrogate).
    """
    try:
        content = (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    except UnicodeEncodeError as err:
        raise ValueError(
            f"{path}: text with a lone surrogate at character {err.start} cannot be written as UTF-8;"
            " clean that text"
        ) from err
    save_bytes(path, content)


def save_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text in UTF-8; the old file stays until the new one is whole."""
    save_bytes(path, text.encode("utf-8"))


def save_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write beside the file, then rename: a reader sees the old content or the new, never a part."""
    with new_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def new_json_list(path: str | os.PathLike[str]) -> Iterator[Callable[[Any], None]]:
    """Give a function that adds one item to a JSON list; the file is replaced when the block ends well.

    Items are written as they come; the bytes are those of `save_json` with the whole list.

    Raises:
        ValueError: an item holds text that UTF-8 cannot hold (a lone surrogate); its number, from 0.
    """
    with new_file(path) as file:
        count = 0

        def add(item: Any) -> None:
            nonlocal count
            text = json.dumps(item, ensure_ascii=False, indent=2).replace("\n", "\n  ")
            try:
                file.write(f"{',' if count else '['}\n  {text}".encode())
            except UnicodeEncodeError as err:
                raise ValueError(
                    f"{path}: item {count} has text with a lone surrogate, which cannot be written as UTF-8;"
                    " clean that text"
                ) from err
            count += 1

        yield add
        file.write(b"\n]\n" if count else b"[]\n")


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a file to write beside `path` that takes its place when the block ends well."""
    with new_files([path]) as (file,):
        yield file


@contextlib.contextmanager
def new_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[list[BinaryIO]]:
    """Give a file to write beside each path; they take their places together, when all is on disk."""
    parts = {_part_of(path): path for path in map(Path, paths)}
    try:
        with contextlib.ExitStack() as files:
            for path in parts.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            opened: list[BinaryIO] = [files.enter_context(part.open("wb")) for part in parts]
            yield opened
            for file in opened:
                file.flush()
                os.fsync(file.fileno())
        for part, path in parts.items():
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def save_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Write records as they come and return their number; the old file stays until the new one is whole.

    A path that ends in `.jsonl` gives an object a line, `.parquet` a Parquet file, and any other a JSON list.

    Raises:
        ValueError: a record holds text that UTF-8 cannot hold (a lone surrogate); its number, from 0.
    """
    suffix = Path(path).suffix
    number = -1
    with contextlib.ExitStack() as files:
        if suffix == ".parquet":
            add = files.enter_context(_new_parquet(path))
        elif suffix == ".jsonl":
            add = files.enter_context(_new_json_lines(path))
        else:
            add = files.enter_context(new_json_list(path))
        for number, record in enumerate(records):
            try:
                add({field: record[field] for field in RECORD_FIELDS})
            except UnicodeEncodeError as err:
                raise ValueError(
                    f"{path}: record {number} has text with a lone surrogate, which cannot be written as"
                    " UTF-8; clean that text"
                ) from err
    return number + 1


@contextlib.contextmanager
def _new_json_lines(path: str | os.PathLike[str]) -> Iterator[Callable[[Record], None]]:
    with new_file(path) as file:

        def add(record: Record) -> None:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

        yield add


@contextlib.contextmanager
def _new_parquet(path: str | os.PathLike[str]) -> Iterator[Callable[[Record], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(field, pa.string()) for field in RECORD_FIELDS])
    waiting: list[Record] = []
    with new_file(path) as file, pq.ParquetWriter(file, schema) as table:

        def write() -> None:
            table.write_batch(pa.RecordBatch.from_pylist(waiting, schema))
            waiting.clear()

        def add(record: Record) -> None:
            for text in record.values():
                text.encode()  # Arrow would tell of a lone surrogate thousands of records later
            waiting.append(record)
            if len(waiting) == PARQUET_ROWS:
                write()

        yield add
        if waiting:
            write()


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records of a file as `iter_records` reads them, with its errors."""
    return list(iter_records(path))


def iter_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the `{instruction, input, output}` records of a file in order, holding few at a time.

    A path that ends in `.jsonl` is read as an object a line, `.parquet` as Parquet, and any other as a JSON
    list. Other fields are dropped.

    Raises:
        EmptyDataError: the file has no record.
        FileNotFoundError: there is no such file.
        ValueError: it is not what its name says, or a record lacks a field or has another type (its number,
            from 0). What stands before the fault has been yielded by then.
    """
    number = -1
    for number, item in enumerate(iter_items(path)):
        yield as_record(path, number, item)
    if number < 0:
        raise EmptyDataError(f"{path}: the list is empty, expected records; check the slice and filters")


def iter_items(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield what a file of records holds, read as `iter_records` does but not looked at.

    Raises:
        FileNotFoundError, ValueError: as `iter_records`, but for what is wrong with a record.
    """
    if not Path(path).is_file():
        read_json(path)  # raises
    readers = {".jsonl": _iter_json_lines, ".parquet": _iter_parquet}
    yield from readers.get(Path(path).suffix, _iter_json_list)(path)


def _iter_json_list(path: str | os.PathLike[str]) -> Iterator[Any]:
    import ijson

    is_empty = True
    with Path(path).open("rb") as file:
        try:
            is_list = next(ijson.basic_parse(file))[0] == "start_array"
            file.seek(0)
            for item in ijson.items(file, "item", use_float=True) if is_list else ():
                is_empty = False
                yield item
        except ijson.JSONError as err:
            read_json(path)  # tells the line, as the streaming reader cannot
            raise ValueError(f"{path}: not JSON ({' '.join(str(err).split())}); mend it") from err
    if is_empty:
        data = read_json(path)
        if not isinstance(data, list):
            raise ValueError(f"{path}: found {type(data).__name__}, expected a list of records")


def _iter_json_lines(path: str | os.PathLike[str]) -> Iterator[Any]:
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except UnicodeDecodeError as err:
                raise ValueError(
                    f"{path}: line {number}, byte {err.start} is not UTF-8; save the file as UTF-8"
                ) from err
            except json.JSONDecodeError as err:
                raise ValueError(
                    f"{path}: line {number}, column {err.colno}: not JSON ({err.msg}); mend that line"
                ) from err


def _iter_parquet(path: str | os.PathLike[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = [field for field in RECORD_FIELDS if field in file.schema_arrow.names]
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        raise ValueError(
            f"{path}: cannot be read as Parquet ({' '.join(str(err).split())[:200]}); write it again"
        ) from err


def as_record(
    path: str | os.PathLike[str],
    number: int,
    item: Any,
    fields: Sequence[str] = RECORD_FIELDS,
    optional: Sequence[str] = (),
) -> Record:
    """Return an item of a file with these fields alone; an optional one that it lacks is empty.

    Raises:
        ValueError: it is no object, or a field is missing or not text; the file and its number are named.
    """
    if not isinstance(item, dict):
        raise ValueError(f"{path}: record {number} is {type(item).__name__}, expected an object")
    for field in fields:
        if field not in item and field not in optional:
            keys = ", ".join(map(str, item)) or "none"
            raise ValueError(
                f'{path}: record {number} has no "{field}" (keys: {keys}); add the field or drop it'
            )
        if not isinstance(item.get(field, ""), str):
            found = type(item[field]).__name__
            raise ValueError(f'{path}: record {number}: "{field}" is {found}, expected text')
    return {field: item.get(field, "") for field in fields}


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a scratch folder beside `path` that takes its place when the block ends well.

    What stood at `path` is replaced only then; after an error or Ctrl-C it is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    part.mkdir()
    try:
        yield part
        old = _part_of(path)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def require_free_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Raise OSError in one line if the disk that holds `path` has less than `needed_bytes` free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"{path}: {free / 1e9:.1f} GB of disk free, about {needed_bytes / 1e9:.1f} GB needed;"
            " free some space and run again"
        )

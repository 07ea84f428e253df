"""Reading and writing: JSON and record files, always whole or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from distill_app.core.errors import EmptyDataError

Record = dict[str, str]
AddRecords = Callable[[list[Any]], None]
RECORD_FIELDS = ("instruction", "input", "output")
PARQUET_ROWS = 4096  # held in memory at a time, or so many bytes
PARQUET_BYTES = 32 << 20
JSON_BYTES = 1 << 20  # read at a time; a text longer than that is copied anew for each piece of it


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
    with new_file(path) as file, _json_list(str(path), file) as add:
        yield lambda item: add([item])


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

    Raises:
        ValueError: see `new_record_files`.
    """
    count = 0
    with new_record_files([path]) as (add,):
        for some in batched({field: record[field] for field in RECORD_FIELDS} for record in records):
            add(some)
            count += len(some)
    return count


def batched(items: Iterable[Any], size: int = 1024) -> Iterator[list[Any]]:
    """Yield the items in lists of `size`, the last one shorter."""
    source = iter(items)
    while some := list(islice(source, size)):
        yield some


@contextlib.contextmanager
def new_record_files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[AddRecords]]:
    """Give for each path a function that adds records; all files are replaced when the block ends well.

    A path that ends in `.jsonl` gives an object a line, `.parquet` a Parquet file, and any other a JSON list.

    Raises:
        ValueError: a record holds text that UTF-8 cannot hold (a lone surrogate); its number, from 0.
    """
    formats = {".jsonl": _json_lines, ".parquet": _parquet}
    with new_files(paths) as files, contextlib.ExitStack() as writers:
        yield [
            writers.enter_context(formats.get(Path(path).suffix, _json_list)(str(path), file))
            for path, file in zip(paths, files, strict=True)
        ]


@contextlib.contextmanager
def _json_list(path: str, file: BinaryIO) -> Iterator[AddRecords]:
    import orjson

    count = 0

    def add(items: list[Any]) -> None:
        nonlocal count
        if items:
            text = _encoded(path, count, items, lambda some: orjson.dumps(some, option=orjson.OPT_INDENT_2))
            file.write(b"," if count else b"[")
            file.write(memoryview(text)[1:-2])  # without the list's own brackets
            count += len(items)

    yield add
    file.write(b"\n]\n" if count else b"[]\n")


@contextlib.contextmanager
def _json_lines(path: str, file: BinaryIO) -> Iterator[AddRecords]:
    import orjson

    count = 0

    def add(records: list[Record]) -> None:
        nonlocal count
        dumps = partial(orjson.dumps, option=orjson.OPT_APPEND_NEWLINE)
        file.write(_encoded(path, count, records, lambda some: b"".join(map(dumps, some))))
        count += len(records)

    yield add


@contextlib.contextmanager
def _parquet(path: str, file: BinaryIO) -> Iterator[AddRecords]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(field, pa.string()) for field in RECORD_FIELDS])
    waiting: list[Record] = []
    count = size = 0
    with pq.ParquetWriter(file, schema) as table:

        def write() -> None:
            nonlocal size
            table.write_batch(pa.RecordBatch.from_pylist(waiting, schema))
            waiting.clear()
            size = 0

        def add(records: list[Record]) -> None:
            nonlocal count, size
            for record in records:
                # Arrow would tell of a lone surrogate thousands of records later
                size += _encoded(path, count, [record], lambda some: sum(map(_bytes_of, some)))
                waiting.append(record)
                count += 1
                if len(waiting) == PARQUET_ROWS or size >= PARQUET_BYTES:
                    write()

        yield add
        if waiting:
            write()


def _bytes_of(record: Record) -> int:
    return sum(len(text.encode()) for text in record.values())


def _encoded(path: str, first: int, items: list[Any], encode: Callable[[list[Any]], Any]) -> Any:
    """Return what `encode` makes of the items, `first` being the number of the first one."""
    try:
        return encode(items)
    except (TypeError, UnicodeEncodeError) as err:
        for number, item in enumerate(items, start=first):
            try:
                json.dumps(item, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{path}: item {number} has text with a lone surrogate, which cannot be written as"
                    " UTF-8; clean that text"
                ) from err
        raise


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
            items = ijson.items(file, "item", use_float=True, buf_size=JSON_BYTES)
            for item in items if is_list else ():
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

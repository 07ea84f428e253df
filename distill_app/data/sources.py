"""Where rows come from: a slice of a Hub or local dataset as row ranges of Parquet files.

Text files (JSON, JSON lines, CSV) become Parquet first, so that all that follows reads one format. Of a Hub
dataset only the shards that the slice touches are downloaded; their row counts come from their footers.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_app.core.errors import EmptyDataError
from distill_app.data.cells import is_text, json_cells, json_fault
from distill_app.data.engine import PATTERN, Database, literal, named, named_errors, open_database, told

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = (".parquet", ".json", ".jsonl", ".csv")
SLICE_HELP = "expected rows of a split, such as train[:1000], train[10%:20%] or train[:5]+train[-5:]"
ENDLESS = 10**15  # rows; a slice that ends before does not depend on the number of rows
MAX_TEXT_BYTES = 64 * 2**20  # of one JSON object or CSV line
JSON_MEMORY_LIMIT = "2GiB"  # reached by texts of many megabytes, which JSON functions hold several times
FOOTERS_AT_ONCE = 8
HUB = "hf://"


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a Parquet file."""

    file: Path
    start: int
    stop: int
    is_whole: bool

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Source:
    """A slice of a dataset.

    Args:
        is_json: the rows are JSON objects in one text column, `json`.
        schema: the columns, with types that hold the values of all shards.
        is_mixed: the shards' types are not all the same.
        states: what each file was when it was found.
    """

    name: str
    database: Database
    parts: tuple[Part, ...]
    is_json: bool
    schema: "pa.Schema"
    is_mixed: bool
    states: Mapping[Path, tuple[int, ...]]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def files(self) -> list[Path]:
        return [part.file for part in self.parts]

    def named_errors(self) -> contextlib.AbstractContextManager[None]:
        return named_errors(self.name, self.files)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of a block that reads the files into ours, as `named_errors` does.

        Raises:
            ValueError: a file is another than was found, so the block may have read parts of both.
        """
        with self.named_errors():
            yield
            for file, state in self.states.items():
                if _state(file) != state:
                    raise ValueError(f"{file}: the file has changed while it was read; run again")

    @cached_property
    def types(self) -> "dict[str, pa.DataType]":
        """The type of each column; of JSON rows, all their keys."""
        import pyarrow as pa

        if self.is_json:
            return {key: pa.json_() for key in self._keys("json_keys(json)")}
        return dict(zip(self.schema.names, self.schema.types, strict=True))

    def keys_within(self, column: str) -> list[str]:
        """Return the keys of the objects in a list column of JSON rows."""
        path = literal(f'$."{column}"[*]')
        return self._keys(f"flatten(json_keys(json, {path}))")

    def _keys(self, keys: str) -> list[str]:
        # Rows have few sets of keys, so these are told apart first
        sets = f"SELECT DISTINCT {keys} AS keys FROM ({self._rows(['json'])})"
        with self.reading():
            found = self.database.rows(f"SELECT DISTINCT unnest(keys) FROM ({sets}) ORDER BY 1")
        return [key for (key,) in found]

    def rows(self, columns: Sequence[str]) -> str:
        """Return SQL that gives `row` (from 0), the named columns, null where absent, and `fault`.

        `fault` is why a JSON row cannot be taken: it is no object, or says a thing twice.
        """
        if not self.is_json:
            known = [f'"{name}"' if name in self.types else f'NULL AS "{name}"' for name in columns]
            present = [name for name in columns if name in self.types]
            return f"SELECT row, {', '.join(known)}, NULL::VARCHAR AS fault FROM ({self._rows(present)})"
        found = f"SELECT row, json, {json_fault('json')} AS fault FROM ({self._rows(['json'])})"
        paths = [f'$."{name}"' for name in columns]
        return f"SELECT * EXCLUDE (json) FROM ({json_cells('json', columns, paths)} ({found})))"

    def _rows(self, columns: Sequence[str]) -> str:
        """Return SQL for `row` and columns: one scan for each run of whole files, one for each part."""
        pieces, base = [], 0
        for is_whole, run in groupby(self.parts, key=lambda part: part.is_whole):
            together = list(run)
            for parts in [together] if is_whole else [[part] for part in together]:
                pieces.append(_scan(parts, base, columns, self.is_mixed))
                base += sum(map(len, parts))
        return " UNION ALL ".join(pieces)


def _scan(parts: Sequence[Part], base: int, columns: Sequence[str], is_mixed: bool) -> str:
    starts = list(accumulate((len(part) for part in parts), initial=base))[:-1]
    first = literal([start - part.start for start, part in zip(starts, parts, strict=True)])
    named = "".join(f', "{name}"' for name in columns)
    files = literal([str(part.file) for part in parts])
    # Otherwise all values are cast to the first file's types; it takes time to open every file
    unified = ", union_by_name = true" * is_mixed
    where = (
        ""
        if parts[0].is_whole
        else f" WHERE file_row_number >= {parts[0].start} AND file_row_number < {parts[0].stop}"
    )
    return (
        f"SELECT {first}[file_index::BIGINT + 1]::BIGINT + file_row_number AS row{named}"
        f" FROM read_parquet({files}, file_row_number = true{unified}){where}"
    )


@contextlib.contextmanager
def open_source(
    dataset: str, slice_str: str, revision: str | None = None, threads: int | None = None
) -> Iterator[Source]:
    """Give the rows of a slice, for as long as the block runs; slices mean what they mean in `datasets`.

    Args:
        dataset: a Hub id, or a local folder or file of Parquet, JSON, JSON lines or CSV.
        slice_str: the `split` of `datasets.load_dataset`, such as `train[:1000]`.
        revision: commit, tag or branch of a Hub dataset.

    Raises:
        EmptyDataError: the slice has no rows.
        FileNotFoundError: there is no such local path, or the Hub shows no such dataset.
        OSError: the Hub cannot be reached.
        ValueError: the slice is none, or a file cannot be read (it is named).
    """
    splits = _local_splits(dataset, revision) if _is_local(dataset) else _hub_splits(dataset, revision)
    with open_database(threads) as database:
        reader = _Reader(dataset, database)
        parts = _take_slice(reader, splits, slice_str)
        if not parts:
            raise EmptyDataError(f"slice {slice_str!r} of {dataset}: it has no rows; widen the slice")
        states = {part.file: _state(part.file) for part in parts}
        schema, is_mixed = _one_schema(list(states))
        name = f"{dataset}, {slice_str}"
        yield Source(name, database, tuple(parts), reader.is_json, schema, is_mixed, states)


def load_rows(dataset: str, slice_str: str, revision: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a slice as `open_source` finds them, with its errors, one at a time."""
    import pyarrow.parquet as pq

    with open_source(dataset, slice_str, revision) as source:
        for part in source.parts:
            at = 0
            with source.reading(), pq.ParquetFile(part.file, pre_buffer=False) as file:
                for batch in file.iter_batches(1024):
                    rows = batch.slice(max(part.start - at, 0), max(part.stop - max(at, part.start), 0))
                    at += len(batch)
                    for row in rows.to_pylist():
                        yield json.loads(row["json"]) if source.is_json else row


def _is_local(dataset: str) -> bool:
    if os.path.exists(dataset) or dataset.startswith((".", "/", "~", "data/")):
        return True
    path = Path(dataset)
    if path.suffix in KINDS or len(path.parts) > 2:  # a Hub id is `name` or `owner/name`
        return True
    return len(path.parts) == 2 and path.parent.is_dir()


def _local_splits(dataset: str, revision: str | None) -> dict[str, list[str]]:
    if revision is not None:
        raise ValueError(f"{dataset}: a local path has no revision, found {revision}; set it to null")
    path = Path(dataset).expanduser().absolute()
    _require_data_files(dataset, path)
    if path.is_file():
        return {"train": [str(path)]}
    if PATTERN.search(str(path)):
        raise ValueError(f"{dataset}: `datasets` takes * ? [ ] for a pattern; rename the folder")
    try:
        return _splits_of(str(path))
    except Exception as err:  # a README whose metadata is broken, a folder that cannot be listed
        raise ValueError(f"{dataset}: cannot be read ({told(_root(err))}); mend the folder") from err


def _require_data_files(dataset: str, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{dataset}: no such file or folder; mend the path, or name a Hub dataset (owner/name)"
        )
    kinds = ", ".join(KINDS)
    if path.is_file() and path.suffix not in KINDS:
        raise ValueError(f"{dataset}: found {path.suffix or 'no suffix'}, expected {kinds}")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in KINDS)
    if not files:
        raise FileNotFoundError(f"{dataset}: the folder holds no data file ({kinds}); fetch it first")
    for file in files:
        if file.is_file() and file.stat().st_size == 0:
            raise EmptyDataError(f"{file}: the file is empty (0 bytes); fetch it again")


def _hub_splits(dataset: str, revision: str | None) -> dict[str, list[str]]:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _splits_of(dataset, revision)
    except HFValidationError as err:
        raise ValueError(f"{dataset}: neither a local path nor a Hub id (owner/name); mend the name") from err
    except RevisionNotFoundError as err:
        raise FileNotFoundError(
            f"{dataset}: the Hub has no revision {revision} of it; mend revision"
        ) from err
    except (DatasetNotFoundError, RepositoryNotFoundError) as err:
        if revision is not None and f"Revision '{revision}' doesn't exist" in str(err):
            raise FileNotFoundError(
                f"{dataset}: the Hub has no revision {revision} of it; mend revision"
            ) from err
        raise FileNotFoundError(
            f"{dataset}: the Hub shows no such dataset, or it is gated or private;"
            " check the id, or ask for access and set HF_TOKEN"
        ) from err
    except Exception as err:  # httpx and its timeouts, a README that is none
        raise _hub_error(dataset, err) from err


def _hub_error(dataset: str, err: Exception) -> OSError:
    return OSError(
        f"{dataset}: cannot be loaded from the Hugging Face Hub ({told(err)}); check the network"
        " (HF_HUB_OFFLINE, proxy), HF_TOKEN and the id, or give a local folder"
    )


def _splits_of(dataset: str, revision: str | None = None) -> dict[str, list[str]]:
    """Return the files of each split as `datasets` finds them: absolute paths, or hf:// addresses."""
    import datasets

    with _quiet_datasets():
        found = datasets.load_dataset_builder(dataset, revision=revision).config.data_files
    return {str(split): list(files) for split, files in (found or {}).items()}


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from printing."""
    logger = logging.getLogger("datasets")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


class _Reader:
    """Counts the rows of files and brings them here as Parquet, each only when it is asked for."""

    def __init__(self, dataset: str, database: Database) -> None:
        self.dataset = dataset
        self.database = database
        self.is_json = False
        self._converted: dict[str, Path] = {}

    def count(self, file: str) -> int:
        """Return a file's number of rows, of Parquet from its footer."""
        import pyarrow.parquet as pq

        if not file.endswith(".parquet"):
            file = str(self.local(file))
        if not file.startswith(HUB):
            with named_errors(self.dataset, [Path(file)]):
                return pq.read_metadata(file).num_rows
        from huggingface_hub import HfFileSystem

        try:
            with HfFileSystem().open(file, cache_type="none") as remote:
                return pq.read_metadata(remote).num_rows
        except Exception as err:  # httpx and its timeouts
            raise _hub_error(self.dataset, err) from err

    def local(self, file: str) -> Path:
        """Return the file as Parquet on this machine, under a path that is no pattern."""
        if file not in self._converted:
            path = self._download(file) if file.startswith(HUB) else Path(file)
            if path.suffix != ".parquet":
                path = self._as_parquet(path)
            elif PATTERN.search(str(path)):
                link = self.database.scratch / f"{len(self._converted)}.parquet"
                link.symlink_to(path)
                path = link
            self._converted[file] = path
        return self._converted[file]

    def _download(self, file: str) -> Path:
        from huggingface_hub import HfFileSystem, hf_hub_download

        try:
            place: Any = HfFileSystem().resolve_path(file)
            name, path = place.repo_id, place.path_in_repo
            return Path(hf_hub_download(name, path, repo_type="dataset", revision=place.revision))
        except Exception as err:  # httpx and its timeouts, a full disk
            raise _hub_error(self.dataset, err) from err

    def _as_parquet(self, path: Path) -> Path:
        target = self.database.scratch / f"{len(self._converted)}.parquet"
        if path.suffix == ".csv":
            sql = _read_csv(path)
        else:
            self.is_json = True
            self.database.rows(f"SET memory_limit = '{JSON_MEMORY_LIMIT}'")
            sql = _read_json(path)
        try:
            with named_errors(str(path)):
                self.database.rows(
                    f"COPY ({sql}) TO {literal(target)} (FORMAT parquet, ROW_GROUP_SIZE 20480)"
                )
        except ValueError as err:
            fault = _json_fault(path) if self.is_json else None
            if fault is None:
                raise
            raise ValueError(f"{path}: cannot be read ({fault}); mend the file or fetch it again") from err
        return target


def _read_json(path: Path) -> str:
    """Return SQL that gives each JSON object of a list or of lines as text.

    Raises:
        ValueError: the file begins with neither.
    """
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if head not in (b"[", b"{"):
        raise ValueError(
            f"{path}: cannot be read (it begins with neither [ nor {{); expected a list, or an object a line"
        )
    kind = "array" if head == b"[" else "newline_delimited"
    return (
        f"SELECT json::VARCHAR AS json FROM read_json_objects({literal([escaped(path)])}, format = '{kind}',"
        f" maximum_object_size = {MAX_TEXT_BYTES})"
    )


def _json_fault(path: Path) -> str | None:
    """Return where lines are no JSON, which the engine tells only roughly; None if this finds nothing."""
    with path.open("rb") as file:
        if file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return None
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                return f"line {number}: a lone surrogate"
            except UnicodeDecodeError as err:
                return f"line {number}: byte {err.start} is not UTF-8"
            except json.JSONDecodeError as err:
                return f"line {number}, column {err.colno}: {err.msg}"
    return None


def _read_csv(path: Path) -> str:
    """Return SQL for the cells of a CSV file as text; an empty cell is null."""
    import csv

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in header)
    if len(set(header)) < len(header) or not columns:
        raise ValueError(f"{path}: cannot be read (header: {named(header)}); expected one name a column")
    return (
        f"SELECT * FROM read_csv({literal([escaped(path)])}, header = true, auto_detect = false, delim = ',',"
        f" quote = '\"', escape = '\"', max_line_size = {MAX_TEXT_BYTES}, columns = {{{columns}}})"
    )


def escaped(path: Path) -> str:
    """Return a path whose characters DuckDB does not take for a pattern."""
    return PATTERN.sub(lambda found: f"[{found[0]}]", str(path))


def _take_slice(reader: _Reader, splits: dict[str, list[str]], slice_str: str) -> list[Part]:
    """Return the parts that a slice means, counting no more files than it needs."""
    from datasets import ReadInstruction

    def bounds(lengths: dict[str, int]) -> list[tuple[str, int, int]]:
        found = ReadInstruction.from_spec(slice_str).to_absolute(lengths)
        return [(i.splitname, i.from_ or 0, lengths[i.splitname] if i.to is None else i.to) for i in found]

    try:
        near, far = (bounds(dict.fromkeys(splits, rows)) for rows in (ENDLESS, 2 * ENDLESS))
        needed: dict[str, int] = {}
        for here, there in zip(near, far, strict=True):
            reach = here[2] if here == there else ENDLESS
            needed[here[0]] = max(reach, needed.get(here[0], 0))
        counts = {split: _count(reader, splits[split], rows) for split, rows in needed.items()}
        slices = bounds({split: sum(rows) for split, rows in counts.items()})
    except (ValueError, AssertionError) as err:
        if isinstance(err, EmptyDataError) or "cannot be read" in str(err):
            raise
        fault = " ".join(str(err).split()).rstrip(".")
        raise ValueError(f"slice {slice_str!r} of {reader.dataset}: {fault}; {SLICE_HELP}") from err
    return [
        part
        for split, start, stop in slices
        for part in _parts(reader, splits[split], counts[split], start, stop)
    ]


def _count(reader: _Reader, files: list[str], needed: int) -> list[int]:
    """Return the rows of each file, up to the file that reaches `needed` rows."""
    if needed >= ENDLESS:
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            remote = all(file.startswith(HUB) and file.endswith(".parquet") for file in files)
            return list((pool.map if remote else map)(reader.count, files))
    counts: list[int] = []
    for file in files:
        if sum(counts) >= needed:
            break
        counts.append(reader.count(file))
    return counts


def _parts(reader: _Reader, files: list[str], counts: list[int], start: int, stop: int) -> Iterator[Part]:
    base = 0
    for file, rows in zip(files, counts, strict=False):
        first, last = max(start - base, 0), min(stop - base, rows)
        if first < last:
            yield Part(reader.local(file), first, last, is_whole=last - first == rows)
        base += rows


def _one_schema(files: Sequence[Path]) -> "tuple[pa.Schema, bool]":
    """Return the columns of all shards, of types that hold all values, and whether some shard has others.

    Raises:
        ValueError: a shard, which is named, has other columns, or values of another kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = {file: _plain_schema(pq.read_schema(file)) for file in files}
    first, *_ = schemas.values()
    others = {file: schema for file, schema in schemas.items() if schema != first}
    whole = first
    for file, schema in others.items():
        if sorted(schema.names) != sorted(first.names):
            raise _odd_shard(
                file, f"columns: {named(sorted(schema.names))}; theirs: {named(sorted(first.names))}"
            )
        try:
            whole = pa.unify_schemas([whole, schema], promote_options="permissive")
        except pa.ArrowException as err:  # it names the column and both types
            raise _odd_shard(file, told(err)) from err
    return whole, bool(others)


def _plain_schema(schema: "pa.Schema") -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(field.with_type(_plain(field.type)) for field in schema)


def _plain(kind: "pa.DataType") -> "pa.DataType":
    """Return the type with one type for all that is text, however Arrow would hold it."""
    import pyarrow as pa
    import pyarrow.types as pt

    if is_text(kind):
        return pa.string()
    if pt.is_list(kind) or pt.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pt.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def _odd_shard(file: Path, fault: str) -> ValueError:
    return ValueError(
        f"{file}: cannot be read with the other shards ({fault}); mend the shard or take another slice"
    )


def _state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _root(err: BaseException) -> BaseException:
    while err.__cause__ is not None:
        err = err.__cause__
    return err

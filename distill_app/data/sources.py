"""Where rows come from: slices of Hub or local datasets, as row ranges of Parquet files.

Text files (JSON, JSON lines, CSV) become Parquet first, so that all that follows reads one format. Of a Hub
dataset only the shards that the slice touches are downloaded; their row counts come from their footers.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_app.core.errors import EmptyDataError
from distill_app.data.cells import is_text
from distill_app.data.hub import HUB, HubDataset, config_error, open_hub, splits_of
from distill_app.data.scratch import file_errors, named, scratch_folder, told
from distill_app.data.tables import Batch, Memory, Part, Wanted, read_batches
from distill_app.data.textfiles import KNOWN_COLUMNS, Keys, iter_rows, to_parquet

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = (".parquet", ".json", ".jsonl", ".csv")
PATTERN = frozenset("*?[]")  # `datasets` takes such a path for a pattern
SLICE_HELP = "expected rows of a split, such as train[:1000], train[10%:20%] or train[:5]+train[-5:]"
ENDLESS = 10**15  # rows; a slice that ends before does not depend on the number of rows
FOOTERS_AT_ONCE = 8
MEMORY_GB = 1.0
MAX_THREADS = 8


@dataclass(frozen=True)
class Dataset:
    """Which rows of which dataset are read, and what its columns are called.

    Args:
        path: a Hub id, or a local folder or file of Parquet, JSON, JSON lines or CSV.
        slice: the `split` of `datasets.load_dataset`, such as `train[:1000]`; it means the same.
        revision: commit, tag or branch of a Hub dataset; None is its default branch.
        config: one of those that it has, such as `main` of gsm8k.
        columns: their name of each of our columns that has another there, such as {"output": "solution"}.
        weight: in a mixture, how many of its rows are taken for those of the others; None takes all.
    """

    path: str
    slice: str = "train"
    revision: str | None = None
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float | None = None


@dataclass(frozen=True)
class Reading:
    """What reading may take: memory of the process in GB, and threads; None takes the cores, at most 8."""

    memory_gb: float = MEMORY_GB
    threads: int | None = None

    def memory(self) -> Memory:
        return Memory.of(int(self.memory_gb * 1e9), self.threads or min(os.cpu_count() or 1, MAX_THREADS))


READING = Reading()


@dataclass(frozen=True)
class Source:
    """The slice of one dataset.

    Args:
        types: our name and the type of each column; of text files, the types that they were given.
        trace_keys: of text files, the keys of the traces; None for Parquet.
        states: what each file was when it was found.
        commit: of a Hub dataset.
    """

    name: str
    dataset: Dataset
    parts: tuple[Part, ...]
    types: "dict[str, pa.DataType]"
    trace_keys: Collection[str] | None
    states: Mapping[Path, tuple[int, ...]]
    memory: Memory
    commit: str | None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def is_text(self) -> bool:
        """Whether the rows come from text files."""
        return self.trace_keys is not None

    def batches(self, wanted: Mapping[str, Collection[str] | None]) -> Iterator[Batch]:
        """Yield the rows in order with the columns asked for, of nested ones the leaves.

        Raises:
            ValueError: a file is another than was found, so the rows may be of both; or it cannot be read.
            OSError: see `read_batches`.
        """
        yield from read_batches(self.parts, self._theirs(wanted), self.memory)
        for file, state in self.states.items():
            with file_errors(file):
                now = _state(file)
            if now != state:
                raise ValueError(f"{file}: the file has changed while it was read; run again")

    def again(self, batch: Batch, wanted: Mapping[str, Collection[str] | None]) -> "dict[str, pa.Array]":
        """Return more columns of a batch."""
        import pyarrow as pa

        found = list(read_batches([batch.part], self._theirs(wanted), self.memory))
        names = found[0].columns
        return {name: pa.concat_arrays([some.columns[name] for some in found]) for name in names}

    def _theirs(self, wanted: Mapping[str, Collection[str] | None]) -> Wanted:
        names = {} if self.is_text else self.dataset.columns  # text files were given our names
        return {name: (names.get(name, name), leaves) for name, leaves in wanted.items()}


@dataclass(frozen=True)
class Sources:
    """The slices of one or more datasets, one after the other."""

    every: tuple[Source, ...]
    scratch: Path

    def __len__(self) -> int:
        return sum(map(len, self.every))

    @property
    def name(self) -> str:
        return " + ".join(source.name for source in self.every)

    @property
    def commits(self) -> dict[str, str]:
        """The commit of each Hub dataset that was read."""
        return {s.dataset.path: s.commit for s in self.every if s.commit is not None}


@contextlib.contextmanager
def open_sources(
    datasets: Dataset | Sequence[Dataset],
    reading: Reading = READING,
    known: Collection[str] = KNOWN_COLUMNS,
) -> Iterator[Sources]:
    """Give the rows of the datasets' slices, for as long as the block runs.

    Of several with weights, as many rows are taken as give these proportions: the first ones of each slice.

    Args:
        known: columns of ours that `Dataset.columns` may name.

    Raises:
        EmptyDataError: a slice has no rows.
        FileNotFoundError: there is no such local path, or the Hub shows no such dataset.
        OSError: the Hub cannot be reached.
        ValueError: the slice or a column is none, or a file cannot be read (it is named).
    """
    with scratch_folder() as scratch:
        every = [datasets] if isinstance(datasets, Dataset) else datasets
        found = [_open(dataset, scratch, reading.memory(), known) for dataset in every]
        yield Sources(tuple(_weighted(found)), scratch)


def _open(dataset: Dataset, scratch: Path, memory: Memory, known: Collection[str]) -> Source:
    odd = [ours for ours in dataset.columns if ours not in known]
    if odd:
        raise ValueError(f"columns: found {odd[0]}, expected some of {named(known)}; fix columns")
    files = _Files(dataset, scratch)
    parts = _take_slice(files, dataset.slice)
    if not parts:
        raise EmptyDataError(f"slice {dataset.slice!r} of {dataset.path}: it has no rows; widen the slice")
    files.remember()
    states = {part.file: _state(part.file) for part in parts}
    types = _types(files, list(states))
    name = f"{dataset.path}, {dataset.slice}"
    keys = files.trace_keys if files.keys else None
    return Source(name, dataset, tuple(parts), types, keys, states, memory, files.commit)


def _types(files: "_Files", found: Sequence[Path]) -> "dict[str, pa.DataType]":
    import pyarrow.parquet as pq

    if files.keys:
        schema = pq.read_schema(found[0])
        mapped = {theirs: ours for ours, theirs in files.dataset.columns.items()}
        names = _one_header(files)
        _require_mapped(files.dataset, names)
        ours = [mapped.get(name, name) for name in names]
        return {name: schema.field(name).type if name in KNOWN_COLUMNS else _text() for name in ours}
    schema = _one_schema(found)
    _require_mapped(files.dataset, schema.names)
    types = dict(zip(reversed(schema.names), reversed(schema.types), strict=True))  # of one name the first
    types = {name: types[name] for name in schema.names}
    return types | {ours: types[theirs] for ours, theirs in files.dataset.columns.items()}


def _text() -> "pa.DataType":
    import pyarrow as pa

    return pa.string()


def _require_mapped(dataset: Dataset, names: Collection[str]) -> None:
    for ours, theirs in dataset.columns.items():
        if theirs not in names:
            raise ValueError(
                f"{dataset.path}: columns.{ours}: found no column {theirs} (columns: {named(names)});"
                " fix columns"
            )


def _one_header(files: "_Files") -> list[str]:
    """Return the keys of all rows of text files, in the order of their names; files of CSV must agree."""
    every = list(files.keys.items())
    first, keys = every[0]
    for file, other in every[1:]:
        if file.suffix == ".csv" and sorted(other.rows) != sorted(keys.rows):
            raise _odd_shard(
                file, f"columns: {named(sorted(other.rows))}; theirs: {named(sorted(keys.rows))}"
            )
    return list(keys.rows) if first.suffix == ".csv" else sorted({name for _, k in every for name in k.rows})


def _weighted(sources: Sequence[Source]) -> Iterator[Source]:
    """Yield the sources with as many rows as give the proportions of their weights."""
    from dataclasses import replace

    weights = [source.dataset.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        yield from sources
        return
    if len(given) < len(weights) or min(given) <= 0:
        raise ValueError(
            f"weight: found {weights}, expected a number over 0 for every dataset, or null for all"
        )
    unit = min(len(source) / weight for source, weight in zip(sources, given, strict=True))
    for source, weight in zip(sources, given, strict=True):
        left = max(1, round(unit * weight))
        parts = []
        for part in source.parts:
            taken = Part(part.file, part.start, min(part.stop, part.start + left))
            left -= len(taken)
            parts += [taken] if len(taken) else []
        yield replace(source, parts=tuple(parts))


def load_rows(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a slice as its files have them, with the errors of `open_sources`, one at a time.

    A row of JSON may be any value.
    """
    import pyarrow.parquet as pq

    with scratch_folder() as scratch:
        files = _Files(dataset, scratch, converts=False)
        parts = _take_slice(files, dataset.slice)
        if not parts:
            raise EmptyDataError(
                f"slice {dataset.slice!r} of {dataset.path}: it has no rows; widen the slice"
            )
        files.remember()
        parquet = [part.file for part in parts if part.file.suffix == ".parquet"]
        if parquet:
            _one_schema(list(dict.fromkeys(parquet)))
        for part in parts:
            if part.file.suffix != ".parquet":
                for at, (row, _) in enumerate(iter_rows(part.file)):
                    if part.start <= at < part.stop:
                        yield row
                continue
            at = 0
            with file_errors(part.file), pq.ParquetFile(part.file, pre_buffer=False) as file:
                for batch in file.iter_batches(64):
                    rows = batch.slice(max(part.start - at, 0), max(part.stop - max(at, part.start), 0))
                    at += len(batch)
                    yield from rows.to_pylist()
                    if at >= part.stop:
                        break


def _is_local(dataset: str) -> bool:
    if os.path.exists(dataset) or dataset.startswith((".", "/", "~", "data/")):
        return True
    path = Path(dataset)
    if path.suffix in KINDS or len(path.parts) > 2:  # a Hub id is `name` or `owner/name`
        return True
    return len(path.parts) == 2 and path.parent.is_dir()


def _local_splits(dataset: Dataset) -> dict[str, list[str]]:
    if dataset.revision is not None:
        raise ValueError(
            f"{dataset.path}: a local path has no revision, found {dataset.revision}; set it to null"
        )
    path = Path(dataset.path).expanduser().absolute()
    _require_data_files(dataset.path, path)
    if path.is_file():
        if dataset.config is not None:
            raise ValueError(
                f"{dataset.path}: a file has no configs, found {dataset.config}; set config to null"
            )
        return {"train": [str(path)]}
    if PATTERN.intersection(str(path)):
        raise ValueError(f"{dataset.path}: `datasets` takes * ? [ ] for a pattern; rename the folder")
    try:
        return splits_of(str(path), dataset.config)
    except Exception as err:  # a README whose metadata is broken, a folder that cannot be listed
        if "Config" in str(err):
            raise config_error(dataset.path, err) from err
        raise ValueError(f"{dataset.path}: cannot be read ({told(_root(err))}); fix the folder") from err


def _require_data_files(dataset: str, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{dataset}: no such file or folder; fix the path, or name a Hub dataset (owner/name)"
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


class _Files:
    """The files of a dataset's splits: counts their rows and brings them here as Parquet, when asked for."""

    def __init__(self, dataset: Dataset, scratch: Path, converts: bool = True) -> None:
        self.dataset = dataset
        self.scratch = scratch
        self.converts = converts
        self.keys: dict[Path, Keys] = {}  # of text files
        self.hub: HubDataset | None = None
        if _is_local(dataset.path):
            self.splits = _local_splits(dataset)
        else:
            self.hub = open_hub(dataset.path, dataset.revision, dataset.config)
            self.splits = self.hub.splits
        self._local: dict[str, Path] = {}

    @property
    def commit(self) -> str | None:
        return None if self.hub is None else self.hub.commit

    @property
    def trace_keys(self) -> set[str]:
        return set().union(*(keys.traces for keys in self.keys.values()))

    def remember(self) -> None:
        if self.hub is not None:
            self.hub.remember()

    def count(self, file: str) -> int:
        """Return a file's number of rows, of Parquet from its footer."""
        import pyarrow.parquet as pq

        if self.hub is not None and file.endswith(".parquet"):
            return self.hub.count(file)
        path = self.local(file)
        if path.suffix != ".parquet":
            return sum(1 for _ in iter_rows(path))
        with file_errors(path):
            return pq.read_metadata(path).num_rows

    def local(self, file: str) -> Path:
        """Return the file on this machine; a text file as Parquet."""
        if file not in self._local:
            path = self.hub.download(file) if self.hub is not None else Path(file)
            if path.suffix != ".parquet" and self.converts:
                target = self.scratch / f"{len(list(self.scratch.iterdir()))}.parquet"
                self.keys[path] = to_parquet(path, target, self.dataset.columns)
                path = target
            self._local[file] = path
        return self._local[file]


def _take_slice(files: _Files, slice_str: str) -> list[Part]:
    """Return the parts that a slice means, counting no more files than it needs."""
    from datasets import ReadInstruction

    def bounds(lengths: dict[str, int]) -> list[tuple[str, int, int]]:
        found = ReadInstruction.from_spec(slice_str).to_absolute(lengths)
        return [(i.splitname, i.from_ or 0, lengths[i.splitname] if i.to is None else i.to) for i in found]

    try:
        near, far = (bounds(dict.fromkeys(files.splits, rows)) for rows in (ENDLESS, 2 * ENDLESS))
        needed: dict[str, int] = {}
        for here, there in zip(near, far, strict=True):
            reach = here[2] if here == there else ENDLESS
            needed[here[0]] = max(reach, needed.get(here[0], 0))
        counts = {split: _count(files, files.splits[split], rows) for split, rows in needed.items()}
        slices = bounds({split: sum(rows) for split, rows in counts.items()})
    except (ValueError, AssertionError) as err:
        if isinstance(err, EmptyDataError) or "cannot be read" in str(err):
            raise
        fault = " ".join(str(err).split()).rstrip(".")
        raise ValueError(f"slice {slice_str!r} of {files.dataset.path}: {fault}; {SLICE_HELP}") from err
    return [
        part
        for split, start, stop in slices
        for part in _parts(files, files.splits[split], counts[split], start, stop)
    ]


def _count(files: _Files, names: list[str], needed: int) -> list[int]:
    """Return the rows of each file, up to the file that reaches `needed` rows."""
    if needed >= ENDLESS:
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            remote = all(name.startswith(HUB) and name.endswith(".parquet") for name in names)
            return list((pool.map if remote else map)(files.count, names))
    counts: list[int] = []
    for name in names:
        if sum(counts) >= needed:
            break
        counts.append(files.count(name))
    return counts


def _parts(files: _Files, names: list[str], counts: list[int], start: int, stop: int) -> Iterator[Part]:
    base = 0
    for name, rows in zip(names, counts, strict=False):
        first, last = max(start - base, 0), min(stop - base, rows)
        if first < last:
            yield Part(files.local(name), first, last)
        base += rows


def _one_schema(files: Sequence[Path]) -> "pa.Schema":
    """Return the columns of all shards, of types that hold all values.

    Raises:
        ValueError: a shard, which is named, has other columns, or values of another kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = {}
    for file in files:
        with file_errors(file):
            schemas[file] = _plain_schema(pq.read_schema(file))
    first, *_ = schemas.values()
    whole = first
    for file, schema in schemas.items():
        if schema == first:
            continue
        if sorted(schema.names) != sorted(first.names):
            raise _odd_shard(
                file, f"columns: {named(sorted(schema.names))}; theirs: {named(sorted(first.names))}"
            )
        try:
            whole = pa.unify_schemas([whole, schema], promote_options="permissive")
        except pa.ArrowException as err:  # it names the column and both types
            raise _odd_shard(file, told(err)) from err
    return whole


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
        f"{file}: cannot be read with the other shards ({fault}); fix the shard or take another slice"
    )


def _state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _root(err: BaseException) -> BaseException:
    while err.__cause__ is not None:
        err = err.__cause__
    return err

"""Rows of Parquet files in batches of bounded size, in order, decoded by several threads.

A batch holds at most so many bytes, whatever the rows' length: row groups that are larger are read page by
page. Only the leaves that are asked for are decoded.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_app.data.scratch import file_errors

if TYPE_CHECKING:
    import pyarrow as pa

# Of each column asked for: its name in the file, and of a nested one the leaves, such as `level.value`
Wanted = Mapping[str, tuple[str, Collection[str] | None]]

BASE_BYTES = 384 << 20  # of the process without data: Python, its libraries, numbers about examples
BATCH_PART = 16  # of the memory for data: what is made of a batch is several times its size
AHEAD_PART = 4  # of the memory for data, in batches that are decoded and wait
READ_BYTES = 1 << 20  # of a file at a time
BITS_A_NUMBER = 32  # more for each value, and they are no numbers of a dictionary's texts
UNEVEN = 8  # times as often as the others the longest texts of a dictionary may stand


@dataclass(frozen=True)
class Memory:
    """What reading may take: bytes of a batch, bytes that wait, and threads that decode."""

    batch: int
    ahead: int
    threads: int

    @classmethod
    def of(cls, limit: int, threads: int) -> "Memory":
        """Return how a process of `limit` bytes reads."""
        free = max(limit - BASE_BYTES, 64 << 20)
        return cls(free // BATCH_PART, free // AHEAD_PART, threads)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a Parquet file."""

    file: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Batch:
    """Columns of consecutive rows, and where they come from."""

    columns: "dict[str, pa.Array]"
    part: Part

    def __len__(self) -> int:
        return len(self.part)


@dataclass(frozen=True)
class _Group:
    """Rows of consecutive row groups: `first` to `last`, counted from `start`, their first in the file."""

    file: Path
    metadata: Any
    numbers: Sequence[int]
    start: int
    first: int
    last: int
    paths: Sequence[str]
    repeated: Sequence[str]  # those of them that stay dictionaries until they are looked at, batch by batch
    bytes: int
    rows: int  # of a batch


def read_batches(parts: Iterable[Part], wanted: Wanted, memory: Memory) -> Iterator[Batch]:
    """Yield the rows of all parts in order; a column that a file lacks is absent.

    Raises:
        FileNotFoundError, OSError, ValueError: see `file_errors`; rows that are too large for the memory.
    """
    waiting: deque[tuple[Future[list[Batch]], int]] = deque()
    with ThreadPoolExecutor(memory.threads) as pool:

        def ready(leave: int) -> Iterator[Batch]:
            while waiting and (sum(size for _, size in waiting) > leave or len(waiting) > 8 * memory.threads):
                yield from waiting.popleft()[0].result()

        for part in parts:
            for group in _joined(_groups(part, wanted, memory), memory.batch // 2):
                if group.bytes <= memory.batch:
                    yield from ready(memory.ahead - group.bytes)
                    waiting.append((pool.submit(_decoded, group, wanted, memory), group.bytes))
                else:
                    yield from ready(-1)
                    yield from _read(group, wanted, memory)
        yield from ready(-1)


def _decoded(group: _Group, wanted: Wanted, memory: Memory) -> list[Batch]:
    return list(_read(group, wanted, memory))


def _groups(part: Part, wanted: Wanted, memory: Memory) -> Iterator[_Group]:
    import pyarrow.parquet as pq

    with file_errors(part.file):
        metadata = pq.read_metadata(part.file)
        paths = _leaf_paths(metadata.schema, wanted)
    places = [at for at in range(metadata.num_columns) if metadata.schema.column(at).path in paths]
    start = 0
    for number in range(metadata.num_row_groups):
        found = metadata.row_group(number)
        first, last = max(part.start - start, 0), min(part.stop - start, found.num_rows)
        if first < last:
            chunks = [found.column(at) for at in places]
            size = sum(chunk.total_uncompressed_size for chunk in chunks)
            if size // found.num_rows > memory.ahead:
                raise ValueError(
                    f"{part.file}: rows {start} to {start + found.num_rows} have about"
                    f" {size // found.num_rows >> 20} MB each, more than the memory holds; raise memory_gb"
                )
            rows = max(1, found.num_rows * memory.batch // max(size, 1))
            repeated = [chunk.path_in_schema for chunk in chunks if _may_repeat(chunk, memory.batch)]
            yield _Group(part.file, metadata, [number], start, first, last, paths, repeated, size, rows)
        start += found.num_rows


def _joined(groups: Iterable[_Group], limit: int) -> Iterator[_Group]:
    """Yield the row groups of one part, small ones together, for each batch costs some time of its own."""
    some: _Group | None = None
    for group in groups:
        # Arrow keeps dictionaries within lists apart for each row group, and does not put them in one batch
        is_nested = any("." in path for each in (some or group, group) for path in each.repeated)
        if some is not None and some.bytes + group.bytes <= limit and not is_nested:
            last = group.start + group.last - some.start
            some = replace(
                some,
                numbers=[*some.numbers, *group.numbers],
                last=last,
                repeated=sorted({*some.repeated, *group.repeated}),
                bytes=some.bytes + group.bytes,
                rows=last,
            )
        else:
            if some is not None:
                yield some
            some = group
    if some is not None:
        yield some


def _may_repeat(chunk: Any, limit: int) -> bool:
    """Return whether texts that stand in a column chunk once may be more than so many bytes when decoded.

    How many texts its dictionary has follows from the bits of a number; some may stand more often.
    """
    if chunk.physical_type != "BYTE_ARRAY" or not chunk.has_dictionary_page or not chunk.num_values:
        return False
    numbers = chunk.total_compressed_size - (chunk.data_page_offset - chunk.dictionary_page_offset)
    bits = 8 * max(numbers, 0) / chunk.num_values
    if bits > BITS_A_NUMBER:  # texts lie beside the dictionary
        return False
    times = max(1.0, chunk.num_values / 2**bits)
    return times * UNEVEN * chunk.total_uncompressed_size > limit


def _leaf_paths(schema: Any, wanted: Wanted) -> list[str]:
    every = [schema.column(at).path for at in range(len(schema))]
    found: list[str] = []
    for name, leaves in wanted.values():
        within = [path for path in every if path == name or path.startswith(f"{name}.")]
        some = [path for path in within if any(f".{leaf}." in f"{path}." for leaf in leaves or ())]
        found += some or within
    return found


def _read(group: _Group, wanted: Wanted, memory: Memory) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    at = 0
    with (
        file_errors(group.file),
        pq.ParquetFile(
            group.file,
            metadata=group.metadata,
            read_dictionary=group.repeated,
            pre_buffer=False,
            buffer_size=READ_BYTES,
        ) as file,
    ):
        batches = file.iter_batches(group.rows, group.numbers, columns=list(group.paths), use_threads=False)
        for batch in batches:
            first, last = max(group.first - at, 0), min(group.last - at, len(batch))
            rows = _fitting(batch, memory.batch) if group.repeated else len(batch)
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                part = Part(group.file, group.start + at + begin, group.start + at + end)
                yield Batch(_columns(batch.slice(begin, end - begin), wanted), part)
            at += len(batch)
            if at >= group.last:
                break


def _fitting(batch: "pa.RecordBatch", limit: int) -> int:
    """Return how many rows have so many bytes when their dictionaries are decoded."""
    size = sum(map(_decoded_bytes, batch.columns))
    return max(1, len(batch) * limit // max(size, limit))


def _decoded_bytes(column: "pa.Array") -> int:
    import pyarrow.compute as pc
    import pyarrow.types as pt

    if pt.is_dictionary(column.type):
        lengths = pc.binary_length(column.dictionary)
        return pc.sum(lengths.take(column.indices)).as_py() or 0
    if pt.is_nested(column.type):
        inner = column.flatten()
        return sum(map(_decoded_bytes, inner if isinstance(inner, list) else [inner]))
    return column.nbytes


def _columns(batch: "pa.RecordBatch", wanted: Wanted) -> "dict[str, pa.Array]":
    found = {}
    for ours, (theirs, _) in wanted.items():
        places = batch.schema.get_all_field_indices(theirs)
        if places:  # of columns with one name the first
            found[ours] = batch.column(places[0])
    return found

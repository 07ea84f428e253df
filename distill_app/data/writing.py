"""Writing selected records from Arrow batches, as fast as they come."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.core.files import RECORD_FIELDS, new_files

if TYPE_CHECKING:
    import pyarrow as pa

    Batches = Iterable[tuple[np.ndarray, pa.RecordBatch]]

# The bytes of `core.files.save_records`; DuckDB quotes the texts several times as fast as Python
LIST_ITEM = (',\n  {\n    "instruction": ', ',\n    "input": ', ',\n    "output": ', "\n  }")
GROUP_ROWS = 20_480  # of which a side makes one row group of Parquet
JOINED_ROWS = 8192
LINE = ('{"instruction": ', ', "input": ', ', "output": ', "}\n")


def write_batches(connection: Any, batches: "Batches", paths: Mapping[int, str]) -> None:
    """Write each record to the file of its side; the files are replaced when all is written.

    Args:
        batches: (sides, records) in order; records have the columns instruction, input and output, and those
            of other sides than the paths' are left out.
        paths: the file of each side, of one format: .jsonl, .parquet, or anything else for a JSON list.
    """
    (suffix,) = {Path(path).suffix for path in paths.values()}
    with new_files(paths.values()) as files:
        opened = dict(zip(paths, files, strict=True))
        if suffix == ".parquet":
            _write_parquet(batches, opened)
        elif suffix == ".jsonl":
            _write_lines(_texts(connection, batches, paths, LINE), opened)
        else:
            _write_lists(_texts(connection, batches, paths, LIST_ITEM), opened)


def _write_parquet(batches: "Batches", files: Mapping[int, Any]) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema([(field, pa.string()) for field in RECORD_FIELDS])
    with contextlib.ExitStack() as tables:
        writers = {side: tables.enter_context(pq.ParquetWriter(file, schema)) for side, file in files.items()}
        for group in _groups(batches):
            for side, writer in writers.items():
                found = group.filter(pc.field("side") == side).drop_columns(["side"])
                if len(found):
                    writer.write_table(found.cast(schema))


def _groups(batches: "Batches") -> "Iterator[pa.Table]":
    """Yield tables with a column of sides, all but the last of GROUP_ROWS, whatever the batches' sizes."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    for sides, batch in batches:
        waiting.append(batch.append_column("side", pa.array(sides)))
        if sum(map(len, waiting)) >= GROUP_ROWS:
            table = pa.Table.from_batches(waiting)
            yield table[:GROUP_ROWS]
            waiting = table[GROUP_ROWS:].to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting)


def _write_lists(texts: Iterable[tuple[int, memoryview]], files: Mapping[int, Any]) -> None:
    begun = set()
    for side, text in texts:
        files[side].write(text if side in begun else b"[" + text[1:])  # in place of the comma
        begun.add(side)
    for side, file in files.items():
        file.write(b"\n]\n" if side in begun else b"[]\n")


def _write_lines(texts: Iterable[tuple[int, memoryview]], files: Mapping[int, Any]) -> None:
    for side, text in texts:
        files[side].write(text)


def _texts(
    connection: Any, batches: "Batches", sides: Collection[int], around: tuple[str, ...]
) -> Iterator[tuple[int, memoryview]]:
    """Yield (side, JSON text of many records), in order."""
    import pyarrow as pa

    schema = pa.schema([("side", pa.int8()), *((field, pa.string()) for field in RECORD_FIELDS)])

    def with_sides() -> "Iterator[pa.RecordBatch]":
        for found, batch in batches:
            columns = [found.astype(np.int8), *batch.columns]
            yield pa.RecordBatch.from_arrays([pa.array(c) for c in columns], schema=schema)

    quoted = ", ".join(f"${at}::VARCHAR, to_json({name})" for at, name in enumerate(RECORD_FIELDS, start=1))
    text = f"concat({quoted}, $4::VARCHAR)"
    # A column for each side: what it holds lies in memory one after the other, ready to be written
    columns = ", ".join(f"CASE WHEN side = {side} THEN {text} ELSE '' END AS side_{side}" for side in sides)
    cursor = connection.cursor()  # the batches may ask the connection themselves
    cursor.register("records", pa.RecordBatchReader.from_batches(schema, with_sides()))
    relation = cursor.sql(f"SELECT {columns} FROM records", params=list(around))
    for batch in relation.to_arrow_reader(JOINED_ROWS):
        for side in sides:
            joined = _joined(batch[f"side_{side}"])
            if joined:
                yield side, joined
    cursor.close()


def _joined(texts: "pa.Array") -> memoryview:
    """Return an Arrow array's texts as they lie in memory: one after the other."""
    import pyarrow as pa

    kind = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    ends = np.frombuffer(texts.buffers()[1], kind)[texts.offset :]
    return memoryview(texts.buffers()[2])[ends[0] : ends[len(texts)]] if ends[len(texts)] else memoryview(b"")

"""The file of a teacher's likeliest tokens: what is in it, writing it as a stream, reading it in place.

An Arrow IPC file with a row for each record of the labelled file, in its order:

    tokens    list<int32>    the answer's n tokens, end of sequence included
    ids       list<int32>    n * top token ids, each token's `top` likeliest in falling order
    logprobs  list<float16>  n * top natural logarithms of their probabilities
    tail      list<float16>  n logarithms of the probability beyond them, TAIL_FLOOR at the least

The schema's metadata says `format`, `top`, `vocab_size`, `tokenizer` and `teacher`.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_app.core.files import new_file
from distill_app.core.models import Tokenizer

FORMAT = "distill-top-logits 1"
BATCH_BYTES = 4 * 2**20  # of one record batch, about; what the writer holds and a reader touches at a time
TAIL_FLOOR = -30.0  # e**-30 is nil beside float16's steps; a tail of no tokens at all is written as this
MAGIC = b"ARROW1"
COLUMNS = {"tokens": np.int32, "ids": np.int32, "logprobs": np.float16, "tail": np.float16}
SCHEMA = pa.schema([(name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in COLUMNS.items()])

Ints = NDArray[np.int32]
Halves = NDArray[np.float16]
AddRow = Callable[[Ints, Ints, NDArray[np.floating[Any]], NDArray[np.floating[Any]]], None]


@dataclass(frozen=True)
class TopRow:
    """One answer of n tokens: `tokens` (n,) int32, `ids` (n, top) int32, `logprobs` (n, top) and `tail` (n,)
    float16."""

    tokens: Ints
    ids: Ints
    logprobs: Halves
    tail: Halves


class TopLogits:
    """The rows of such a file, by number; their arrays are read-only views of the mapped file.

    It pickles as its path, so that a data loader's workers each map the file for themselves.

    Args:
        path: a file that `new_top_logits` wrote.

    Attributes:
        top: likeliest tokens kept for each answer token; 0 where there is no row.
        vocab_size: tokens over which the probabilities add up to one.
        tokenizer: `tokenizer_digest` of the teacher's.
        teacher: its name in the params.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Arrow file, is cut off, or has another format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        schema, self._batches = _read_batches(self.path)
        about = _metadata(self.path, schema)
        self.top, self.vocab_size = int(about["top"]), int(about["vocab_size"])
        self.tokenizer, self.teacher = about["tokenizer"], about["teacher"]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> TopRow:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: found row {row}, expected 0 to {len(self) - 1}")
        number = bisect_right(self._ends, row)
        batch = self._batches[number]
        place = row - self._ends[number] + batch.num_rows
        tokens, ids, logprobs, tail = (_view(batch, name, place) for name in COLUMNS)
        shape = len(tokens), self.top
        return TopRow(tokens, ids.reshape(shape), logprobs.reshape(shape), tail)

    def __reduce__(self) -> tuple[type["TopLogits"], tuple[Path]]:
        return TopLogits, (self.path,)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of the tokens and their ids, added ones too: what has it equal shares the ids."""
    items = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(items.encode()).hexdigest()


@contextmanager
def new_top_logits(
    path: str | os.PathLike[str], top: int, vocab_size: int, tokenizer_digest: str, teacher: str
) -> Iterator[AddRow]:
    """Give a function that adds one row; the file is replaced when the block ends well.

    It takes `tokens` (n,), `ids` (n, top), `logprobs` (n, top) and `tail` (n,). Rows are written as they
    come, a record batch at a time; the same rows give the same bytes.
    """
    about = {
        "format": FORMAT,
        "top": str(top),
        "vocab_size": str(vocab_size),
        "tokenizer": tokenizer_digest,
        "teacher": teacher,
    }
    schema = SCHEMA.with_metadata(about)
    rows: list[tuple[NDArray[Any], ...]] = []
    held = 0
    with new_file(path) as file, pa.ipc.new_file(file, schema) as writer:

        def flush() -> None:
            nonlocal held
            if rows:
                columns = [_lists([row[i] for row in rows]) for i in range(len(COLUMNS))]
                writer.write_batch(pa.record_batch(columns, schema=schema))
            rows.clear()
            held = 0

        def add(tokens: Ints, ids: Ints, logprobs: NDArray[Any], tail: NDArray[Any]) -> None:
            nonlocal held
            n = len(tokens)
            assert ids.shape == logprobs.shape == (n, top) and tail.shape == (n,)
            values = zip((tokens, ids, logprobs, tail), COLUMNS.values(), strict=True)
            row = tuple(np.array(value, dtype).ravel() for value, dtype in values)
            rows.append(row)
            held += sum(column.nbytes for column in row)
            if held >= BATCH_BYTES:
                flush()

        yield add
        flush()


def _lists(rows: list[NDArray[Any]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


def _read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Return the schema and every batch; of the batches only their headers are read here."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; run the label stage with label.top_logits above 0, or pull it (dvc pull)"
        )
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as err:
        with path.open("rb") as file:
            is_arrow = file.read(len(MAGIC)) == MAGIC
        raise ValueError(
            f"{path}: found {'an Arrow file that is cut off' if is_arrow else 'no Arrow file'},"
            f' expected "{FORMAT}"; run the label stage again, or pull it (dvc pull)'
        ) from err


def _metadata(path: Path, schema: pa.Schema) -> dict[str, str]:
    about = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    found = about.get("format", "none")
    if found != FORMAT or not schema.equals(SCHEMA):
        columns = "" if found != FORMAT else f" with the columns {', '.join(schema.names)}"
        raise ValueError(
            f'{path}: found format "{found}"{columns}, expected "{FORMAT}"; run the label stage again'
        )
    return about


def _view(batch: pa.RecordBatch, name: str, place: int) -> NDArray[Any]:
    lists = batch.column(name)
    begin, end = lists.offsets[place].as_py(), lists.offsets[place + 1].as_py()
    return lists.values[begin:end].to_numpy(zero_copy_only=True)

"""The file of a teacher's likeliest tokens: what is in it, writing it as a stream, reading it by row.

An Arrow IPC file with a row for each record of the labelled file, in its order:

    length  int32   the answer's n tokens, end of sequence included
    tokens  binary  these n token ids
    ids     binary  n * top token ids, each token's `top` likeliest in falling order
    widths  binary  of n * (top + 1) numbers, how many bits each has in `bits`
    bits    binary  these numbers

A token id takes 16 bits; where the vocabulary is larger, the bits above them follow in a plane of their own.
The numbers tell log-probabilities in steps of STEP nats: for each token how far the likeliest is below 0, how
far each further one is below the one before it, and how far the rest beyond them is below 0. Most numbers
are small, so they are stored as in an Elias gamma code (IEEE Trans. Inf. Theory 21(2), 1975): a number's
width in unary, and then so many bits.

Each log-probability is within STEP / 2 of what was given, so the divergence of the stored distribution from
the teacher's is at most STEP**2 / 8 nats (Hoeffding's lemma). What is below TAIL_FLOOR is stored as that.

The schema's metadata says `format`, `top`, `vocab_size`, `tokenizer` and `teacher`.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
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

FORMAT = "distill-top-logits 2"
STEP = 1 / 16  # nats
TAIL_FLOOR = -30.0  # e**-30 is nothing beside a step; a rest of no tokens at all is stored as this
BATCH_BYTES = 4 * 2**20  # of one record batch, about; what the writer holds at a time
ID_BITS = 16  # of a token id in the first plane
MAGIC = b"ARROW1"
PLANES = ("tokens", "ids", "widths", "bits")
SCHEMA = pa.schema([("length", pa.int32()), *((name, pa.binary()) for name in PLANES)])

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class TopRow:
    """One answer of n tokens: `tokens` (n,) int32, `ids` (n, top) int32, `logprobs` (n, top) and `tail` (n,)
    float32, natural logarithms; `tail` is of the probability beyond the `top` likeliest tokens."""

    tokens: Ints
    ids: Ints
    logprobs: Floats
    tail: Floats


AddRow = Callable[[TopRow], None]


@dataclass(frozen=True)
class About:
    """What the rows of a file share.

    Args:
        top: likeliest tokens kept for each answer token; 0 where there is no row.
        vocab_size: tokens over which the probabilities add up to one.
        tokenizer: `tokenizer_digest` of the teacher's.
        teacher: its name in the params.
    """

    top: int
    vocab_size: int
    tokenizer: str
    teacher: str

    @property
    def schema(self) -> pa.Schema:
        """The file's schema."""
        values = {"top": self.top, "vocab_size": self.vocab_size}
        texts = {"format": FORMAT, "tokenizer": self.tokenizer, "teacher": self.teacher}
        return SCHEMA.with_metadata({**texts, **{name: str(value) for name, value in values.items()}})


class TopLogits:
    """The rows of such a file, by number; the file is mapped, and a row is decoded when it is asked for.

    It pickles as its path, so that a data loader's workers each map the file for themselves.

    Args:
        path: a file that `new_top_logits` or `join_top_logits` wrote.

    Attributes:
        about: what the rows share; its `top`, `vocab_size`, `tokenizer` and `teacher` are attributes too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Arrow file, is cut off, or has another format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        schema, self.batches = _read_batches(self.path)
        self.about = about = _read_about(self.path, schema)
        self.top, self.vocab_size = about.top, about.vocab_size
        self.tokenizer, self.teacher = about.tokenizer, about.teacher
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> TopRow:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: found row {row}, expected 0 to {len(self) - 1}")
        number = bisect_right(self._ends, row)
        batch = self.batches[number]
        place = row - self._ends[number] + batch.num_rows
        n, top = batch["length"][place].as_py(), self.top
        tokens, ids, widths, bits = (_bytes(batch[name][place]) for name in PLANES)
        numbers = _unpacked_numbers(widths, bits, n * (top + 1)).reshape(n, top + 1)
        return TopRow(
            _unpacked_ids(tokens, n, self.vocab_size),
            _unpacked_ids(ids, n * top, self.vocab_size).reshape(n, top),
            (numbers[:, :top].cumsum(1) * -STEP).astype(np.float32),
            (numbers[:, top] * -STEP).astype(np.float32),
        )

    def __reduce__(self) -> tuple[type["TopLogits"], tuple[Path]]:
        return TopLogits, (self.path,)


def tokenizer_digest(tokenizer: Tokenizer, vocab_size: int | None = None) -> str:
    """Return a SHA-256 of the tokens and their ids, added ones too: what has it equal shares the ids.

    Which of the tokens end a sequence or pad it, and the chat template, have no part in it.

    Args:
        vocab_size: takes the ids below it alone, for a tokenizer to which tokens were added at the end.
    """
    items = sorted(tokenizer.get_vocab().items())
    if vocab_size is not None:
        items = [item for item in items if item[1] < vocab_size]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


@contextmanager
def new_top_logits(path: str | os.PathLike[str], about: About) -> Iterator[AddRow]:
    """Give a function that adds one row; the file is replaced when the block ends well.

    A row's `logprobs` must not rise from one likeliest token to the next. Rows are written as they come, a
    record batch at a time; the same rows give the same bytes.
    """
    rows: list[dict[str, Any]] = []
    held = 0
    with new_file(path) as file, pa.ipc.new_file(file, about.schema) as writer:

        def flush() -> None:
            nonlocal held
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, about.schema))
            rows.clear()
            held = 0

        def add(row: TopRow) -> None:
            nonlocal held
            rows.append(_packed(row, about))
            held += sum(len(rows[-1][name]) for name in PLANES)
            if held >= BATCH_BYTES:
                flush()

        yield add
        flush()


def join_top_logits(path: str | os.PathLike[str], about: About, parts: Iterable[Path]) -> None:
    """Write the rows of several files, one file after the other, as one file."""
    with new_file(path) as file, pa.ipc.new_file(file, about.schema) as writer:
        for part in parts:
            found = TopLogits(part)
            assert found.about == about
            for batch in found.batches:
                writer.write_batch(batch)


def _packed(row: TopRow, about: About) -> dict[str, Any]:
    n = len(row.tokens)
    assert row.ids.shape == row.logprobs.shape == (n, about.top) and row.tail.shape == (n,)
    widths, bits = _packed_numbers(_numbers(row.logprobs, row.tail))
    return {
        "length": n,
        "tokens": _packed_ids(row.tokens, about.vocab_size),
        "ids": _packed_ids(row.ids.ravel(), about.vocab_size),
        "widths": widths,
        "bits": bits,
    }


def _numbers(logprobs: NDArray[Any], tail: NDArray[Any]) -> NDArray[np.int64]:
    """Return the numbers that tell a row's log-probabilities, in the order in which they are stored."""
    below = np.rint(-np.maximum(logprobs, TAIL_FLOOR) / STEP).astype(np.int64)
    gaps = np.diff(below, axis=1, prepend=0)
    rest = np.rint(-np.maximum(tail, TAIL_FLOOR) / STEP).astype(np.int64)
    numbers = np.concatenate([gaps, rest[:, None]], 1).ravel()
    assert not len(numbers) or numbers.min() >= 0  # sorted, and no probability above 1
    return numbers


def _packed_numbers(numbers: NDArray[np.int64]) -> tuple[bytes, bytes]:
    """Return widths in unary and bits of numbers from 0; the bits of n are those of n + 1 but the highest."""
    values = numbers + 1
    widths = np.frexp(values)[1] - 1
    ends = np.cumsum(widths + 1)
    unary = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    ends = np.cumsum(widths)
    bits = np.zeros(widths.sum(), np.uint8)
    for bit in range(widths.max(initial=0)):  # the lowest comes last
        wide = widths > bit
        bits[ends[wide] - 1 - bit] = values[wide] >> bit & 1
    return np.packbits(unary).tobytes(), np.packbits(bits).tobytes()


def _unpacked_numbers(widths: Bytes, bits: Bytes, count: int) -> NDArray[np.int32]:
    """Return `count` numbers of at most 17 bits, which is more than a log-probability above the floor has."""
    ends = np.flatnonzero(np.unpackbits(widths))[:count].astype(np.int32)
    sizes = np.diff(ends, prepend=np.int32(-1)) - 1
    starts = np.cumsum(sizes, dtype=np.int32) - sizes
    ahead = np.concatenate([bits, np.zeros(3, np.uint8)]).astype(np.int32)
    words = ahead[:-2] << 16 | ahead[1:-1] << 8 | ahead[2:]  # from each byte, it and the next two
    highest = np.left_shift(np.int32(1), sizes)
    low = words[starts >> 3] >> (24 - (starts & 7) - sizes) & (highest - 1)
    numbers: NDArray[np.int32] = (highest | low) - 1
    return numbers


def _packed_ids(ids: Ints, vocab_size: int) -> bytes:
    assert not len(ids) or 0 <= ids.min() <= ids.max() < vocab_size
    high = [np.packbits((ids >> place & 1).astype(np.uint8)) for place in _high_places(vocab_size)]
    return b"".join([ids.astype("<u2").tobytes(), *(plane.tobytes() for plane in high)])


def _bytes(value: pa.BinaryScalar) -> Bytes:
    return np.frombuffer(value.as_buffer(), np.uint8)


def _unpacked_ids(packed: Bytes, count: int, vocab_size: int) -> Ints:
    ids = packed[: 2 * count].view("<u2").astype(np.int32)
    size = (count + 7) // 8
    for number, place in enumerate(_high_places(vocab_size)):
        plane = packed[2 * count + number * size :][:size]
        ids |= np.unpackbits(plane, count=count).astype(np.int32) << place
    return ids


def _high_places(vocab_size: int) -> range:
    return range(ID_BITS, (vocab_size - 1).bit_length())


def _read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Return the schema and every batch; of the batches only their headers are read here."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; run the stage that writes it, with top_logits above 0, or pull it"
        )
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as err:
        with path.open("rb") as file:
            is_arrow = file.read(len(MAGIC)) == MAGIC
        raise ValueError(
            f"{path}: found {'an Arrow file that is cut off' if is_arrow else 'no Arrow file'},"
            f' expected "{FORMAT}"; run the stage that writes it again, or pull it'
        ) from err


def _read_about(path: Path, schema: pa.Schema) -> About:
    values = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    found = values.get("format", "none")
    if found != FORMAT or not schema.equals(SCHEMA):
        columns = "" if found != FORMAT else f" with the columns {', '.join(schema.names)}"
        raise ValueError(
            f'{path}: found format "{found}"{columns}, expected "{FORMAT}"; run the stage that writes it'
            " again"
        )
    return About(int(values["top"]), int(values["vocab_size"]), values["tokenizer"], values["teacher"])

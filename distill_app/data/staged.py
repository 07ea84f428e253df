"""Examples in scratch files: written once, in order; read back by number, in any order, few at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.core.files import Record

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 4 << 20  # of texts read at a time, or one text where that is longer
CHUNK_TEXTS = 4096
SPARSE = 4  # a stretch of a file is read whole where so much of it at most is not asked for


class Staged:
    """Texts of examples, and facts about them that are seldom asked for."""

    def __init__(self, folder: Path) -> None:
        self._questions = _Texts(folder / "questions", 2)
        self._outputs = _Texts(folder / "outputs", 1)
        self._facts_path = folder / "facts.arrow"
        self._facts: Any = None
        self._facts_ends: list[int] = []

    def __len__(self) -> int:
        return len(self._questions)

    def add(
        self, instruction: "pa.Array", given: "pa.Array", output: "pa.Array", facts: "pa.RecordBatch"
    ) -> None:
        """Add examples, all texts as large_string without nulls."""
        import pyarrow as pa

        if self._facts is None:
            self._facts = pa.ipc.new_file(pa.OSFile(str(self._facts_path), "wb"), facts.schema)
        self._questions.add(instruction, given)
        self._outputs.add(output)
        self._facts.write_batch(facts)
        self._facts_ends.append((self._facts_ends or [0])[-1] + len(facts))

    def close(self) -> None:
        """End the writing, before anything is read."""
        self._questions.close()
        self._outputs.close()
        if self._facts is not None:
            self._facts.close()

    @property
    def bytes(self) -> "np.ndarray[Any, Any]":
        """The UTF-8 bytes of each example's texts together."""
        return self._questions.lengths.sum(1, dtype=np.int64) + self._outputs.lengths[:, 0]

    def questions(
        self, numbers: "np.ndarray[Any, Any]"
    ) -> Iterator[tuple["np.ndarray[Any, Any]", list[Sequence[str]]]]:
        """Yield (numbers, [(instruction, input), ...]) in the order of the numbers."""
        return self._questions.read(numbers)

    def records(
        self, numbers: "np.ndarray[Any, Any]"
    ) -> Iterator[tuple["np.ndarray[Any, Any]", list[Record]]]:
        """Yield (numbers, records) in the order of the numbers."""
        for some, outputs in self._outputs.read(numbers):
            asked = (pair for _, pairs in self._questions.read(some) for pair in pairs)
            yield (
                some,
                [
                    {"instruction": instruction, "input": given, "output": output}
                    for (instruction, given), (output,) in zip(asked, outputs, strict=True)
                ],
            )

    def facts(self, number: int) -> dict[str, Any]:
        """Return the facts of one example."""
        import pyarrow as pa

        batch = int(np.searchsorted(self._facts_ends, number, side="right"))
        first = self._facts_ends[batch - 1] if batch else 0
        with pa.OSFile(str(self._facts_path)) as file:
            return pa.ipc.open_file(file).get_batch(batch).slice(number - first, 1).to_pylist()[0]


class _Texts:
    """Rows of `width` texts in a file, one after the other."""

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        self.width = width
        self._file = path.open("wb")
        self._lengths: list[np.ndarray[Any, Any]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, *columns: "pa.Array") -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        joined = columns[0]
        if len(columns) > 1:
            joined = pc.binary_join_element_wise(*columns, pa.scalar("", pa.large_string()))
        self._lengths.append(
            np.stack([pc.binary_length(c).to_numpy(zero_copy_only=False) for c in columns], 1).astype(
                np.uint32
            )
        )
        first, last = (joined.buffers()[1], joined.offset), (joined.buffers()[1], joined.offset + len(joined))
        begin, end = (int(np.frombuffer(buffer, np.int64)[at]) for buffer, at in (first, last))
        if end > begin:
            self._file.write(memoryview(joined.buffers()[2])[begin:end])

    def close(self) -> None:
        self._file.close()
        empty = np.zeros((0, self.width), np.uint32)
        self.lengths = np.concatenate([empty, *self._lengths])
        self._lengths.clear()
        self.ends = self.lengths.sum(1, dtype=np.int64).cumsum()

    def read(
        self, numbers: "np.ndarray[Any, Any]"
    ) -> Iterator[tuple["np.ndarray[Any, Any]", list[Sequence[str]]]]:
        with self.path.open("rb") as file:
            for some in self._chunks(numbers):
                ends = self.ends[some]
                starts = ends - self.lengths[some].sum(1, dtype=np.int64)
                first, last = int(starts.min()), int(ends.max())
                if last - first <= SPARSE * int((ends - starts).sum()) + CHUNK_BYTES:
                    file.seek(first)
                    data, places = file.read(last - first), starts - first
                else:
                    data, places = _gathered(file, starts, ends), np.append(0, (ends - starts).cumsum()[:-1])
                yield some, _cut(data, places, self.lengths[some])

    def _chunks(self, numbers: "np.ndarray[Any, Any]") -> Iterator["np.ndarray[Any, Any]"]:
        at = 0
        while at < len(numbers):
            some = numbers[at : at + CHUNK_TEXTS]
            size = self.lengths[some].sum(1, dtype=np.int64).cumsum()
            some = some[: max(1, int(np.searchsorted(size, CHUNK_BYTES)))]
            yield some
            at += len(some)


def _gathered(file: Any, starts: "np.ndarray[Any, Any]", ends: "np.ndarray[Any, Any]") -> bytes:
    found = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        file.seek(start)
        found.append(file.read(end - start))
    return b"".join(found)


def _cut(data: bytes, places: "np.ndarray[Any, Any]", lengths: "np.ndarray[Any, Any]") -> list[Sequence[str]]:
    """Return rows of texts out of the bytes that hold them."""
    edges = np.column_stack([places, places[:, None] + lengths.cumsum(1, dtype=np.int64)]).T.tolist()
    columns: list[list[str]] = []
    if data.isascii():
        whole = data.decode("ascii")
        columns = [
            [whole[a:b] for a, b in zip(begin, end, strict=True)]
            for begin, end in zip(edges[:-1], edges[1:], strict=True)
        ]
    else:
        columns = [
            [data[a:b].decode() for a, b in zip(begin, end, strict=True)]
            for begin, end in zip(edges[:-1], edges[1:], strict=True)
        ]
    return list(zip(*columns, strict=True))

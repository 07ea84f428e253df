"""The files of the answer store: segments, to which one run appends lines, and an index of what they hold.

A line is `CRC KIND NUMBER KEY BODY`: the CRC-32 of what follows it (8 hexadecimal digits), the first letter
of its kind, a number (16 digits), a SHA-256 and JSON in UTF-8. Each line has a newline before it as well as
behind it, so one that is damaged or half written takes no other with it.
"""

import json
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from distill_app.generation.answers import Answer

SUFFIX = ".answers"
ABANDONED_SEC = 86400.0
RECENT = 1 << 16  # records that are held outside the sorted arrays: about 15 MB
KIND, NUMBER, HEAD, KEY, BODY = slice(9, 10), slice(11, 27), slice(28, 44), slice(28, 92), slice(93, -1)


def as_line(
    kind: Literal["answer", "question", "recipe", "end"], number: int, key: bytes, body: Any
) -> bytes:
    """Return a record as a segment holds it; the key has 32 bytes."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    content = f" {kind[0]} {number:016x} {key.hex()} {text}".encode()
    return b"\n%08x%b\n" % (zlib.crc32(content), content)


def is_whole(line: bytes) -> bool:
    """Tell whether a line with its newline is as it was written."""
    return line[:8] == b"%08x" % zlib.crc32(memoryview(line)[8:-1])


class Segment:
    """A file of lines, and how far it was read."""

    def __init__(self, path: Path, place: int = 0) -> None:
        self.path, self.place = path, place
        self.size = 0  # bytes of whole lines that were read
        self.fault = ""  # what is not as it was written, for people
        self.is_ended = False  # its writer will never write again
        self.recipes: set[str] = set()

    def new_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the place in the file and the text of each line that was not read yet.

        Raises:
            FileNotFoundError: the file is gone; what it held is in another one.
        """
        damaged, self.fault = 0, ""
        with self.path.open("rb") as file:
            file.seek(self.size)
            for line in file:
                if not line.endswith(b"\n"):
                    self.fault = "a last line that is not whole"  # a run was killed, or is writing it now
                    return
                start, self.size = self.size, self.size + len(line)
                if is_whole(line):
                    yield start, line
                elif len(line) > 1:
                    damaged += 1
                    self.fault = f"{damaged} damaged lines"

    def in_use(self) -> bool:
        """Tell whether its run may write to it still; a run that was killed may not after a day."""
        try:
            return not self.is_ended and time.time() - self.path.stat().st_mtime < ABANDONED_SEC
        except FileNotFoundError:  # compacted
            return False


class Record(NamedTuple):
    """A stored answer; of several that serve, the first in this order is the answer."""

    number: int
    segment: str
    start: int
    key: bytes
    limit: int  # tokens, under which it was made
    recipe: str
    answer: Answer

    def serves(self, limit: int) -> bool:
        """Tell whether it is the answer under another token limit, too.

        A cut answer is that under its own limit alone, unless the model's context cut it before. A refusal
        may be for want of room, so it says nothing about smaller limits; nor does an answer whose tokens its
        server did not count.
        """
        tokens, reason = self.answer.tokens, self.answer.finish_reason
        if reason == "length" and (not tokens or tokens >= self.limit):
            return self.limit == limit
        return (self.limit if reason == "refused" or not tokens else tokens) <= limit


def as_record(segment: str, start: int, line: bytes) -> Record:
    """Return what the line of an answer says."""
    limit, recipe, *fields = json.loads(line[BODY])
    key = bytes.fromhex(line[KEY].decode())
    return Record(int(line[NUMBER], 16), segment, start, key, limit, recipe, Answer(*fields))


def read_records(path: Path, places: Iterable[tuple[int, bytes]]) -> Iterator[Record]:
    """Yield the answers at places of a segment to their keys, without those that are damaged by now."""
    with path.open("rb") as file:
        for start, key in places:
            file.seek(start)
            line = file.readline()
            if is_whole(line) and (record := as_record(path.name, start, line)).key == key:
                yield record


class Index:
    """Where records lie, by the first 8 bytes of their key; who looks must compare the whole key.

    Sorted arrays, each at least twice as long as the next: 16 bytes a record, and 45 at most while two are
    merged.
    """

    def __init__(self) -> None:
        self._recent: dict[int, tuple[int, ...]] = {}
        self._arrays: list[np.ndarray[Any, Any]] = []  # (2, records): heads of keys in order, places

    def add(self, head: int, place: int) -> None:
        """Add a record under the head of its key."""
        self._recent[head] = (*self._recent.get(head, ()), place)
        if len(self._recent) < RECENT:
            return
        pairs = [(head, place) for head, places in self._recent.items() for place in places]
        new = np.array(pairs, np.uint64).T
        while self._arrays and self._arrays[-1].shape[1] < 2 * new.shape[1]:
            new = np.concatenate([self._arrays.pop(), new], axis=1)
        self._arrays.append(np.ascontiguousarray(new[:, np.argsort(new[0], kind="stable")]))
        self._recent.clear()

    def find(self, head: int) -> list[int]:
        """Return the places of all records under a head."""
        found = list(self._recent.get(head, ()))
        for heads, places in self._arrays:
            first, last = (int(np.searchsorted(heads, np.uint64(head), side)) for side in ("left", "right"))
            found += places[first:last].tolist()
        return found

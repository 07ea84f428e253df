"""What both systems' selections share: rules over staged examples, the split, the counts, the files.

The source is read once. A reader says of each example why it is dropped, if it is; the texts of all others
are staged in scratch files, in order. Later rules work on a few numbers about each of those, 60 bytes an
example, and read the staged texts as a stream, so memory does not grow with the texts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import new_record_files, save_json, save_text
from distill_app.core.prompts import Mode, format_prompt, format_response
from distill_app.data.frames import frame
from distill_app.data.heldout import HELDOUT, TRAIN, normalise_all
from distill_app.data.sources import Sources
from distill_app.data.staged import Staged

if TYPE_CHECKING:
    import pyarrow as pa

    Numbers = np.ndarray[Any, np.dtype[Any]]

BYTES_A_TOKEN = 4  # of UTF-8, where no tokenizer is named
REJECTS_A_REASON = 20
SHOWN_CHARACTERS = 200  # of a reject's text


@dataclass(frozen=True)
class Outputs:
    """Where a selection goes; what is None is not written. A file's suffix says its format."""

    train: str
    heldout: str | None = None
    rejects: str | None = None
    tokens: str | None = None


class Reasons:
    """Why each of some examples is dropped; the first reason stays."""

    def __init__(self, count: int) -> None:
        self.codes = np.zeros(count, np.int16)
        self.names = [""]

    def drop(self, reason: str, numbers: "Numbers") -> None:
        """Drop the examples of these numbers that have no reason yet."""
        if reason not in self.names:
            self.names.append(reason)
        free = numbers[self.codes[numbers] == 0]
        self.codes[free] = self.names.index(reason)

    def drop_where(self, reason: str, flags: "Numbers") -> None:
        """Drop the examples that have a flag."""
        self.drop(reason, np.flatnonzero(flags))

    def left(self) -> "Numbers":
        """Return the numbers of the examples without a reason."""
        return np.flatnonzero(self.codes == 0)

    def of(self, reason: str) -> "Numbers":
        return np.flatnonzero(self.codes == self.names.index(reason))

    def counts(self) -> dict[str, int]:
        """Return how many each reason took."""
        found = np.bincount(self.codes, minlength=len(self.names))
        return {name: int(found[code]) for code, name in enumerate(self.names) if code and found[code]}


@dataclass(frozen=True)
class Examples:
    """The examples of consecutive rows, and the texts of those that are taken.

    Args:
        reasons: why the others are dropped.
        row: of each example, counted within these rows, not falling.
        trace: its number within its row, -1 where the row has none; None where rows are examples.
        facts: of each example, what explains a decision; `chars` among them, to choose the shortest by.
        shown: gives the texts of one example, whether taken or not.
        instruction, input, output: of those taken, large_string without nulls.
        text_id, output_id: of those taken; equal for one question, and for one output.
        distance: of those taken, from the levels looked for; NaN where unknown.
    """

    reasons: Reasons
    row: "Numbers"
    trace: "Numbers | None"
    facts: "dict[str, pa.Array]"
    shown: Callable[[int], dict[str, str | None]]
    instruction: "pa.Array"
    input: "pa.Array"
    output: "pa.Array"
    text_id: "Numbers"
    output_id: "Numbers"
    distance: "Numbers"

    def about(self, number: int, first_row: int) -> dict[str, Any]:
        """Return the facts of one example, without its texts."""
        trace = None if self.trace is None or self.trace[number] < 0 else int(self.trace[number])
        found = {"row": first_row + int(self.row[number]), "trace": trace}
        return found | {name: column[number].as_py() for name, column in self.facts.items()}


class Selection:
    """The examples of a source, fewer with each rule.

    Args:
        seed: of the split, and of the draw of rejects.
        asked: a row whose examples are explained at the end.
    """

    def __init__(self, sources: Sources, seed: int, asked: int | None = None) -> None:
        self.sources = sources
        self.seed = seed
        self.asked = asked
        self.rows_in = len(sources)
        self.examples = 0
        self.tokens_are = f"UTF-8 bytes / {BYTES_A_TOKEN}"
        self.staged = Staged(sources.scratch)
        self._rows = 0
        self._early: dict[str, int] = {}
        self._draws: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self._explained: list[tuple[dict[str, Any], str, int]] = []
        self._parts: list[tuple[Numbers, ...]] = []
        self._count = 0

    def add(self, found: Examples, rows: int) -> None:
        """Add the examples of the next rows."""
        import pyarrow as pa

        taken = found.reasons.left()
        for reason, count in found.reasons.counts().items():
            self._early[reason] = self._early.get(reason, 0) + count
            self._draw(reason, found)
        if self.asked is not None and self._rows <= self.asked < self._rows + rows:
            self._explain(found, taken)
        facts = {name: column.take(pa.array(taken)) for name, column in found.facts.items()}
        trace = pa.nulls(len(taken), pa.int64()) if found.trace is None else pa.array(found.trace[taken])
        about = pa.record_batch({"row": pa.array(self._rows + found.row[taken]), "trace": trace, **facts})
        self.staged.add(found.instruction, found.input, found.output, about)
        chars = facts["chars"].to_numpy(zero_copy_only=False).astype(np.int32)
        self._parts.append((self.examples + taken, found.text_id, found.output_id, chars, found.distance))
        self._count += len(taken)
        self._rows += rows
        self.examples += len(found.row)

    def close(self) -> None:
        """End the reading, before any rule."""
        self.staged.close()
        kinds = (np.int64, np.int64, np.int64, np.int32, np.float64)
        columns = []
        for at, kind in enumerate(kinds):
            columns.append(np.concatenate([np.zeros(0, kind), *(part[at] for part in self._parts)]))
        self._parts.clear()
        self.n, text_id, self.output_id, self.chars, self.distance = columns
        found, inverse = np.unique(text_id, return_inverse=True)
        self.question = inverse.astype(np.int32 if len(found) < 2**31 else np.int64)
        self.reasons = Reasons(self._count)
        self.side = np.zeros(self._count, np.int8)
        self.tokens: Numbers | None = None

    def taken(self, side: int | None = None) -> "Numbers":
        """Return the numbers of the examples that are left, in order; of one side, if named."""
        left = self.reasons.left()
        return left if side is None else left[self.side[left] == side]

    def questions(self, numbers: "Numbers | None" = None) -> "Iterator[tuple[Numbers, list[str]]]":
        """Yield (numbers, instruction and input as one text) of examples; by default of all that are left."""
        for some, pairs in self.staged.questions(self.taken() if numbers is None else numbers):
            yield some, [f"{instruction} {given}" for instruction, given in pairs]

    def drop_duplicates(self) -> None:
        """Drop what has been said before: the same output to the same question."""
        taken = self.taken()
        order, again = _runs(self.question[taken], self.output_id[taken])
        self.reasons.drop("duplicate", taken[order[again]])

    def drop_further_traces(self, count: int) -> None:
        """Keep so many examples a question: nearest to the levels looked for, of equals the shortest."""
        taken = self.taken()
        order = np.lexsort((self.chars[taken], self.distance[taken], self.question[taken]))
        of = self.question[taken][order]
        starts = np.flatnonzero(np.append(True, of[1:] != of[:-1])) if len(of) else np.zeros(0, np.int64)
        place = np.arange(len(of)) - np.repeat(starts, np.diff(np.append(starts, len(of))))
        self.reasons.drop("over max_traces", taken[order[place >= count]])

    def count_tokens(self, mode: Mode, tokenizer_name: str, revision: str | None = None) -> None:
        """Count each example's tokens as training does: prompt, output, end of sequence."""
        from distill_app.core.models import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_name, revision)

        def lengths(texts: list[str]) -> "Numbers":
            return np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])

        self.tokens = np.zeros(len(self.n), np.int32)
        for numbers, records in self.staged.records(self.taken()):
            prompts = [format_prompt(record["instruction"], record["input"], mode) for record in records]
            outputs = [format_response(record["output"]) for record in records]
            self.tokens[numbers] = lengths(prompts) + lengths(outputs) + 1
        self.tokens_are = tokenizer_name if revision is None else f"{tokenizer_name}@{revision}"

    def drop_long(self, max_tokens: int) -> None:
        """Drop what has more tokens, as they were counted."""
        assert self.tokens is not None
        self.reasons.drop_where("over max_tokens", self.tokens > max_tokens)

    def split(self, fraction: float, frames: float = 0.0) -> None:
        """Put each example on its side, by a hash of its normalised text and the seed alone.

        So a text stays on its side when the slice grows. Where that leaves a side empty although `fraction`
        > 0 and there are two texts, the text nearest to the threshold changes side; it may change back when
        the slice grows.

        Args:
            frames: share of the frames (`frames.py`) that are held out whole, by a hash too: all problems
                told in those words.

        Raises:
            ValueError: a share is not in [0, 1).
        """
        for name, share in (("heldout_fraction", fraction), ("heldout_frames", frames)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: found {share}, expected 0 or more and less than 1")
        taken = self.taken()
        questions, at = np.unique(self.question[taken], return_index=True)
        place, frame_place, key = self._places(taken[np.sort(at)], frames > 0)
        held = place[questions] < fraction
        texts, first = np.unique(key[questions], return_index=True)
        if fraction > 0 and len(texts) > 1:
            if not held.any():
                held = place[questions] == place[questions].min()
            elif held[first].all():
                held = place[questions] < place[questions].max()
        self.heldout_frames = len(np.unique(frame_place[questions][frame_place[questions] < frames]))
        sides = np.zeros(len(place), np.int8)
        sides[questions] = np.where(held | (frame_place[questions] < frames), HELDOUT, TRAIN)
        self.side = sides[self.question]
        self.key = key  # what spellings of one text share

    def _places(self, firsts: "Numbers", with_frames: bool) -> "tuple[Numbers, Numbers, Numbers]":
        """Return of each question its place in [0, 1), that of its frame, and the key of its text.

        Args:
            firsts: an example of each question.
            with_frames: without, a frame's place is 1.
        """
        import pyarrow as pa

        count = int(self.question.max(initial=-1)) + 1
        place, frame_place, key = np.ones(count), np.ones(count), np.zeros(count, np.uint64)
        text_seed, frame_seed = f"{self.seed} ".encode(), f"{self.seed} frame ".encode()
        for some, texts in self.questions(firsts):
            normal = normalise_all(pa.array(texts, pa.large_string()))
            here = self.question[some]
            place[here], key[here] = _digests(text_seed, normal.cast(pa.large_binary()))
            if with_frames:
                frames = pa.array(map(frame, normal.to_pylist()), pa.large_string())
                has_frame = frames.cast(pa.large_binary()).to_numpy(zero_copy_only=False) != b""
                found, _ = _digests(frame_seed, frames.cast(pa.large_binary()))
                frame_place[here] = np.where(has_frame, found, 1.0)
        return place, frame_place, key

    def drop_further_heldout(self) -> None:
        """Keep one example of each held-out text, the first in the order of the output."""
        taken = self.taken(HELDOUT)
        of = self.question[taken]
        order = np.lexsort((self._firsts(of, taken), self.key[of]))
        keys = self.key[of][order]
        again = np.append(False, keys[1:] == keys[:-1])[: len(keys)]
        self.reasons.drop("further trace of a held-out question", taken[order[again]])

    def _firsts(self, question: "Numbers", numbers: "Numbers") -> "Numbers":
        """Return for each example the number of the first one with its question."""
        _, at, inverse = np.unique(question, return_index=True, return_inverse=True)
        return numbers[at][inverse]

    def dropped(self) -> dict[str, int]:
        """Return how many each reason took, by the reasons' names."""
        return dict(sorted((self._early | self.reasons.counts()).items()))

    def require_some(self, traces_in: int | None = None) -> None:
        """Raise EmptyDataError, with what each rule took, if no example is left to train on."""
        held_out = len(self.taken(HELDOUT))
        if len(self.taken()) > held_out:
            return
        found = f"{self.rows_in} rows" + (f" with {traces_in} traces" if traces_in is not None else "")
        took = ", ".join(f"{count} {reason}" for reason, count in self.dropped().items())
        where = f" to train on (held out: {held_out}; " if held_out else " ("
        raise EmptyDataError(
            f"{self.sources.name}: none of {found} is left{where}dropped: {took or 'nothing'});"
            " loosen the filter that took most, or take another slice"
        )

    def write(self, outputs: Outputs) -> None:
        """Write the files, records by question and questions in order."""
        taken = self.taken()
        firsts = self._firsts(self.question[taken], taken)
        if (firsts[1:] < firsts[:-1]).any():  # a question comes again after another one
            taken = taken[np.argsort(firsts, kind="stable")]
        paths = {TRAIN: outputs.train, HELDOUT: outputs.heldout}
        wanted = {side: path for side, path in paths.items() if path is not None}
        with new_record_files(list(wanted.values())) as writers:
            for numbers, records in self.staged.records(taken):
                sides = self.side[numbers].tolist()
                for side, add in zip(wanted, writers, strict=True):
                    add([record for record, on in zip(records, sides, strict=True) if on == side])
        if outputs.tokens is not None:
            save_text(outputs.tokens, self.histogram())
        if outputs.rejects is not None:
            save_json(outputs.rejects, self.rejects())

    def summary(self) -> dict[str, Any]:
        """Return the counts and the tokens of what is left."""
        train, heldout = len(self.taken(TRAIN)), len(self.taken(HELDOUT))
        tokens = np.sort(self._tokens())
        median, p95 = (
            int(tokens[max(1, len(tokens) - int(len(tokens) - q * len(tokens))) - 1]) for q in (0.5, 0.95)
        )
        commits = {"commits": self.sources.commits} if self.sources.commits else {}
        return {
            "kept": train + heldout,
            "train": train,
            "heldout": heldout,
            "dropped": self.dropped(),
            "tokens": {"counted_by": self.tokens_are, "median": median, "p95": p95, "max": int(tokens[-1])},
            **commits,
        }

    def _tokens(self) -> "Numbers":
        taken = self.taken()
        return self.tokens[taken] if self.tokens is not None else self.staged.bytes[taken] // BYTES_A_TOKEN

    def histogram(self) -> str:
        """Return CSV: records of up to so many tokens; four bins a doubling, so that bins never change."""
        counts: dict[int, int] = {}
        for tokens, records in zip(*np.unique(self._tokens(), return_counts=True), strict=True):
            counts[bin_end(int(tokens))] = counts.get(bin_end(int(tokens)), 0) + int(records)
        return "tokens,records\n" + "".join(f"{end},{counts[end]}\n" for end in sorted(counts))

    def _draw(self, reason: str, found: Examples) -> None:
        """Keep those rejects of a reason that the seed draws so far, with the heads of their questions."""
        numbers = found.reasons.of(reason)
        places = _draws(self.examples + numbers, self.seed)
        drawn = self._draws.setdefault(reason, [])
        few = np.argsort(places, kind="stable")[:REJECTS_A_REASON]
        last = drawn[-1][0] if len(drawn) == REJECTS_A_REASON else None
        for at in few:
            if last is None or int(places[at]) < last:
                number = int(numbers[at])
                texts = found.shown(number)
                texts.pop("output", None)
                facts = found.about(number, self._rows) | {"reason": reason} | _heads(texts)
                drawn.append((int(places[at]), facts))
        drawn.sort(key=lambda one: one[0])
        del drawn[REJECTS_A_REASON:]

    def rejects(self) -> list[dict[str, Any]]:
        """Return some rejects of each reason with the heads of their questions, drawn by the seed."""
        every = [facts for drawn in self._draws.values() for _, facts in drawn]
        for reason in self.reasons.counts():
            numbers = self.reasons.of(reason)
            numbers = numbers[
                np.argsort(_draws(self.n[numbers], self.seed), kind="stable")[:REJECTS_A_REASON]
            ]
            for number in numbers.tolist():
                ((_, ((instruction, given),)),) = self.staged.questions(np.array([number]))
                texts = {"instruction": instruction, "input": given}
                every.append(self._about(number) | {"reason": reason} | _heads(texts))
        last = float("inf")
        every.sort(key=lambda f: (f["reason"], f["row"], last if f["trace"] is None else f["trace"]))
        return [{name: value for name, value in facts.items() if value is not None} for facts in every]

    def _about(self, number: int) -> dict[str, Any]:
        tokens = None if self.tokens is None else int(self.tokens[number])
        return self.staged.facts(number) | {"tokens": tokens, "side": int(self.side[number])}

    def _explain(self, found: Examples, taken: "Numbers") -> None:
        assert self.asked is not None
        for number in np.flatnonzero(found.row == self.asked - self._rows).tolist():
            facts = found.about(number, self._rows) | _heads(found.shown(number))
            reason = found.reasons.names[found.reasons.codes[number]]
            self._explained.append((facts, reason, self._count + int(np.searchsorted(taken, number))))

    def explain(self) -> list[str]:
        """Return a line for each example of the row asked about: where it went, or which rule took it."""
        lines = []
        for facts, reason, number in self._explained:
            side = 0
            if not reason:
                reason = self.reasons.names[self.reasons.codes[number]]
                side = int(self.side[number])
                if self.tokens is not None:
                    facts = {**facts, "tokens": int(self.tokens[number])}
            lines.append(_explained(reason=reason, side=side, **facts))
        return lines


def require_row(sources: Sources, row: int) -> None:
    """Raise ValueError if the slice has no such row."""
    if not 0 <= row < len(sources):
        raise ValueError(
            f"--explain: found row {row}, expected 0 to {len(sources) - 1}, rows of {sources.name}"
        )


def _runs(*keys: "Numbers") -> "tuple[Numbers, Numbers]":
    """Return an order that brings equal keys together, the first ones first, and which are no first ones."""
    order = np.lexsort(keys[::-1])
    again = np.ones(len(order), np.bool_)
    again[:1] = False
    for key in keys:
        again[1:] &= key[order[1:]] == key[order[:-1]]
    return order, again


def _digests(seed: bytes, texts: "pa.Array") -> "tuple[Numbers, Numbers]":
    """Return a place in [0, 1) and a key for each text, out of its SHA-256 after the seed."""
    sha256 = hashlib.sha256
    digests = b"".join([sha256(seed + text).digest() for text in texts.to_numpy(zero_copy_only=False)])
    found = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    places = np.zeros((len(found), 8), np.uint8)
    places[:, 2:] = found[:, :6]
    key = np.ascontiguousarray(found[:, 6:14]).view(">u8")[:, 0]
    return places.view(">u8")[:, 0] / 2.0**48, key.astype(np.uint64)  # 48 bits are exact in a float


def _draws(numbers: "Numbers", seed: int) -> "Numbers":
    """Return a number drawn for each; the smallest ones are taken.

    Source: the finaliser of MurmurHash3 as DuckDB has it, in whose draws these began.
    """
    factor, half = np.uint64(0xD6E8FEB86659FD93), np.uint64(32)
    found = (numbers + seed).astype(np.uint64)
    for _ in range(2):
        found = (found ^ (found >> half)) * factor
    return found ^ (found >> half)


def _heads(texts: Mapping[str, str | None]) -> dict[str, str | None]:
    return {name: text and text[:SHOWN_CHARACTERS] for name, text in texts.items()}


def _explained(row: int, trace: int | None, reason: str, side: int, **facts: Any) -> str:
    where = f"row {row}" + (f", trace {trace}" if trace is not None else "")
    verdict = f"dropped: {reason}" if reason else {TRAIN: "kept for training", HELDOUT: "held out"}[side]
    known = (f"{name} {value!r}" for name, value in facts.items() if value is not None)
    return f"{where}: {verdict} ({', '.join(known)})"


def bin_end(tokens: int) -> int:
    """Return the end of the histogram bin of a count: 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ..."""
    step = max(1, 2 ** (max(tokens - 1, 1).bit_length() - 3))
    return -(-max(tokens, 1) // step) * step

"""What both systems' selections share: rules over staged examples, the split, the counts, the files.

The rules that SQL can say run while the source is read, once. All examples are staged in an Arrow file, in
order, with the texts of those that are left. Later rules work on a small table of numbers and read the staged
texts as a stream, so memory does not grow with the texts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import RECORD_FIELDS, save_json, save_text
from distill_app.core.prompts import Mode, format_prompt, format_response
from distill_app.data.engine import literal
from distill_app.data.heldout import normalise_all
from distill_app.data.sources import Source
from distill_app.data.staged import Staged
from distill_app.data.writing import write_batches

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN, HELDOUT = 1, 2
BYTES_A_TOKEN = 4  # of UTF-8, where no tokenizer is named
REJECTS_A_REASON = 20
SHOWN_CHARACTERS = 200  # of a reject's text
NEEDED_LATER = ("n", "row", "text_id", "output_id", "chars", "distance", "bytes")


@dataclass(frozen=True)
class Outputs:
    """Where a selection goes; what is None is not written. A file's suffix says its format."""

    train: str
    heldout: str | None = None
    rejects: str | None = None
    tokens: str | None = None


class Selection:
    """The examples of a source, fewer with each rule.

    Args:
        sql: gives for each example, in order, row, trace, reason (null: taken so far), instruction, input,
            output, text_id (equal for one question), output_id, chars to choose the shortest by, bytes of
            all texts, distance from the levels looked for; and whatever columns explain a decision.
        question: SQL for row and instruction of all rows, cheaper to read than `sql`.
    """

    def __init__(self, source: Source, sql: str, question: str) -> None:
        self.source = source
        self.question = question
        self.database = source.database
        with source.reading():
            self.staged = Staged(self.database, "staged", sql)
        self.database.over(
            self.staged.read(*NEEDED_LATER, "reason"),
            f"CREATE TABLE examples AS SELECT {', '.join(NEEDED_LATER)}, NULL::BIGINT AS tokens,"
            " NULL::VARCHAR AS reason, 0::TINYINT AS side FROM found WHERE reason IS NULL",
        )
        self.rows_in = len(source)
        self.tokens_are = f"UTF-8 bytes / {BYTES_A_TOKEN}"

    def drop(self, reason: str, numbers: str) -> None:
        """Drop the examples that SQL names by `n`, from a table or view `taken`."""
        self._view_taken()
        self.database.rows(f"UPDATE examples SET reason = {literal(reason)} WHERE n IN ({numbers})")

    def _view_taken(self) -> None:
        left = "SELECT * FROM examples WHERE reason IS NULL"
        self.database.rows(f"CREATE OR REPLACE TEMP VIEW taken AS {left}")

    def drop_numbers(self, reason: str, numbers: "np.ndarray[Any, Any] | list[int]") -> None:
        """Drop the examples of these numbers."""
        import pyarrow as pa

        self.database.rows("CREATE OR REPLACE TEMP TABLE named (n BIGINT)")
        self.database.over(pa.table({"n": pa.array(numbers, pa.int64())}), "INSERT INTO named FROM found")
        self.drop(reason, "SELECT n FROM named")

    def drop_duplicates(self) -> None:
        """Drop what has been said before: the same output to the same question."""
        again = "row_number() OVER (PARTITION BY text_id, output_id ORDER BY n) > 1"
        self.drop("duplicate", f"SELECT n FROM taken QUALIFY {again}")

    def batches(
        self, numbers: str = "SELECT n FROM taken", fields: Sequence[str] = RECORD_FIELDS
    ) -> "Iterator[tuple[np.ndarray, pa.RecordBatch]]":
        """Yield (n, texts) of the examples that SQL names by `n`, in order; by default the whole records."""
        self._view_taken()
        wanted = self.database.connection.execute(f"{numbers} ORDER BY n").fetchnumpy()["n"]
        return self._read(wanted, fields)

    def _read(
        self, wanted: "np.ndarray[Any, Any]", fields: Sequence[str]
    ) -> "Iterator[tuple[np.ndarray, pa.RecordBatch]]":
        at = 0
        for batch in self.staged.read(*fields):
            first, last = np.searchsorted(wanted, [at, at + len(batch)])
            if first < last:
                yield wanted[first:last], batch.take(wanted[first:last] - at)
            at += len(batch)

    def count_tokens(self, tokenizer_name: str, mode: Mode) -> None:
        """Count each example's tokens as training does: prompt, output, end of sequence."""
        import pyarrow as pa

        from distill_app.core.models import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_name)

        def lengths(texts: list[str]) -> "np.ndarray[Any, Any]":
            return np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])

        self.database.rows("CREATE TABLE counted (n BIGINT, tokens BIGINT)")
        for numbers, batch in self.batches():
            instructions, inputs, outputs = (column.to_pylist() for column in batch.columns)
            prompts = [format_prompt(i, p, mode) for i, p in zip(instructions, inputs, strict=True)]
            tokens = lengths(prompts) + lengths([format_response(output) for output in outputs]) + 1
            self.database.over(
                pa.table({"n": numbers, "tokens": tokens}), "INSERT INTO counted SELECT * FROM found"
            )
        self.database.rows("UPDATE examples SET tokens = c.tokens FROM counted c WHERE examples.n = c.n")
        self.tokens_are = tokenizer_name

    def split(self, fraction: float, seed: int) -> None:
        """Put each example on its side, by a hash of its normalised text and the seed alone.

        So a text stays on its side when the slice grows. Where that leaves a side empty although `fraction`
        > 0 and there are two texts, the text nearest to the threshold changes side; it may change back when
        the slice grows.

        Raises:
            ValueError: the fraction is not in [0, 1).
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"heldout_fraction: found {fraction}, expected 0 or more and less than 1")
        self._place_texts(seed)
        held = f"place < {fraction!r}"
        if fraction > 0:
            texts, held_out = self.database.rows(
                f"SELECT count(*), count(*) FILTER ({held}) FROM (SELECT DISTINCT key, place FROM texts)"
            )[0]
            if texts > 1 and held_out == 0:
                held = "place = (SELECT min(place) FROM texts)"
            elif texts > 1 and held_out == texts:
                held = "place < (SELECT max(place) FROM texts)"
        self.database.rows(
            f"UPDATE examples SET side = CASE WHEN {held} THEN {HELDOUT} ELSE {TRAIN} END"
            " FROM texts WHERE texts.text_id = examples.text_id"
        )

    def _place_texts(self, seed: int) -> None:
        """Make the table `texts`: text_id, place in [0, 1), and a key that spellings of a text share."""
        import pyarrow as pa
        import pyarrow.compute as pc

        schema = pa.schema([("text_id", pa.uint64()), ("text", pa.large_string())])
        firsts = self.batches(
            "SELECT min(n) AS n FROM taken GROUP BY text_id", ("text_id", "instruction", "input")
        )

        def keys() -> "Iterator[pa.RecordBatch]":
            for _, batch in firsts:
                joined = pc.binary_join_element_wise(batch["instruction"], batch["input"], " ")
                yield pa.record_batch([batch["text_id"], normalise_all(joined)], schema=schema)

        digest = f"SELECT text_id, sha256('{seed} ' || text) AS digest FROM found"
        self.database.over(
            pa.RecordBatchReader.from_batches(schema, keys()),
            "CREATE TABLE texts AS"
            " SELECT text_id, ('0x' || digest[:12])::UBIGINT / 2.0::DOUBLE ** 48 AS place,"
            f" ('0x' || digest[13:28])::UBIGINT AS key FROM ({digest})",
        )

    def drop_further_heldout(self) -> None:
        """Keep one example of each held-out text, the first in the order of the output."""
        again = "row_number() OVER (PARTITION BY key ORDER BY first, n) > 1"
        self.drop(
            "further trace of a held-out question",
            "SELECT n FROM (SELECT t.n, x.key, min(t.n) OVER (PARTITION BY t.text_id) AS first"
            f" FROM taken t JOIN texts x USING (text_id) WHERE t.side = {HELDOUT}) QUALIFY {again}",
        )

    def dropped(self) -> dict[str, int]:
        """Return how many each reason took."""
        counts = self.database.over(
            self.staged.read("reason"),
            "SELECT reason, count(*) FROM (SELECT reason FROM examples UNION ALL SELECT reason FROM found)"
            " WHERE reason IS NOT NULL GROUP BY 1 ORDER BY 1",
        )
        return dict(counts)

    def require_some(self, traces_in: int | None = None) -> None:
        """Raise EmptyDataError, with what each rule took, if no example is left to train on."""
        train, held_out = self.database.rows(
            f"SELECT count(*) FILTER (side <> {HELDOUT}), count(*) FILTER (side = {HELDOUT})"
            " FROM examples WHERE reason IS NULL"
        )[0]
        if train:
            return
        found = f"{self.rows_in} rows" + (f" with {traces_in} traces" if traces_in is not None else "")
        took = ", ".join(f"{count} {reason}" for reason, count in self.dropped().items())
        where = f" to train on (held out: {held_out}; " if held_out else " ("
        raise EmptyDataError(
            f"{self.source.name}: none of {found} is left{where}dropped: {took or 'nothing'});"
            " loosen the filter that took most, or take another slice"
        )

    def write(self, outputs: Outputs, seed: int) -> None:
        """Write the files, records by question and questions in order."""
        # Before anything is written: they are the last that is read of the source
        rejects = None if outputs.rejects is None else self.rejects(seed)
        paths = {TRAIN: outputs.train, HELDOUT: outputs.heldout}
        wanted = {side: path for side, path in paths.items() if path is not None}
        with self.source.named_errors():
            write_batches(self.database.connection, self._sides(), wanted)
        if outputs.tokens is not None:
            save_text(outputs.tokens, self.histogram())
        if outputs.rejects is not None:
            save_json(outputs.rejects, rejects)

    def _sides(self) -> "Iterator[tuple[np.ndarray, pa.RecordBatch]]":
        """Yield (sides, records) in the order of the output; what is dropped has side 0."""
        self.database.rows(
            "CREATE OR REPLACE TEMP VIEW ordered AS"
            " SELECT n, side, min(n) OVER (PARTITION BY text_id) AS first FROM examples WHERE reason IS NULL"
        )
        goes_back = "SELECT first < lag(first) OVER (ORDER BY n) AS back FROM ordered"
        if self.database.one(
            f"SELECT count(*) FROM ({goes_back}) WHERE back"
        ):  # a question comes again after another one
            with self.database.reading(self.staged.read(*RECORD_FIELDS, "n")):
                ordered = Staged(
                    self.database,
                    "ordered",
                    f"SELECT {', '.join(RECORD_FIELDS)}, side FROM found JOIN ordered USING (n)"
                    " ORDER BY first, n",
                )
            for batch in ordered.read(*RECORD_FIELDS, "side"):
                yield np.asarray(batch["side"]), batch.drop_columns(["side"])
            return
        kept = self.database.connection.execute("SELECT n, side FROM ordered").fetchnumpy()
        sides = np.zeros(self.staged.rows, np.int8)
        sides[kept["n"]] = kept["side"]
        at = 0
        for batch in self.staged.read(*RECORD_FIELDS):
            yield sides[at : at + len(batch)], batch
            at += len(batch)

    def summary(self) -> dict[str, Any]:
        """Return the counts and the tokens of what is left."""
        train, heldout = (
            self.database.one(f"SELECT count(*) FROM examples WHERE reason IS NULL AND side = {side}")
            for side in (TRAIN, HELDOUT)
        )
        median, p95, longest = self.database.rows(
            "SELECT quantile_disc(tokens, 0.5), quantile_disc(tokens, 0.95), max(tokens)"
            f" FROM ({self._tokens()})"
        )[0]
        return {
            "kept": train + heldout,
            "train": train,
            "heldout": heldout,
            "dropped": self.dropped(),
            "tokens": {"counted_by": self.tokens_are, "median": median, "p95": p95, "max": longest},
        }

    def _tokens(self) -> str:
        estimate = f"-(-bytes // {BYTES_A_TOKEN})"
        return f"SELECT coalesce(tokens, {estimate}) AS tokens FROM examples WHERE reason IS NULL"

    def histogram(self) -> str:
        """Return CSV: records of up to so many tokens; four bins a doubling, so that bins never change."""
        counts: dict[int, int] = {}
        for tokens, records in self.database.rows(
            f"SELECT tokens, count(*) FROM ({self._tokens()}) GROUP BY 1"
        ):
            counts[bin_end(tokens)] = counts.get(bin_end(tokens), 0) + records
        return "tokens,records\n" + "".join(f"{end},{counts[end]}\n" for end in sorted(counts))

    def rejects(self, seed: int) -> list[dict[str, Any]]:
        """Return some rejects of each reason with the head of their questions, drawn by the seed."""
        draw = f"arg_min(n, hash(n + {seed}), {REJECTS_A_REASON})"
        every = "SELECT n, reason FROM found UNION ALL SELECT n, reason FROM examples"
        drawn = self.database.over(
            self.staged.read("n", "reason"),
            f"SELECT unnest({draw}) FROM ({every}) WHERE reason IS NOT NULL GROUP BY reason",
        )
        numbers = literal([n for (n,) in drawn] or [-1])[1:-1]
        # Without their outputs, the longest of the texts: a draw from all over reads all of the column
        return self._facts(f"n IN ({numbers})", "reason, row, trace", ("instruction", "input"))

    def explain(self, row: int) -> list[str]:
        """Return a line for each example of a row: where it went, or which rule took it.

        Raises:
            ValueError: the slice has no such row.
        """
        if not 0 <= row < self.rows_in:
            raise ValueError(
                f"--explain: found row {row}, expected 0 to {self.rows_in - 1}, rows of {self.source.name}"
            )
        return [_explained(**facts) for facts in self._facts(f"row = {row}", "trace")]

    def _facts(self, which: str, order: str, fields: Sequence[str] = RECORD_FIELDS) -> list[dict[str, Any]]:
        """Return what is known of staged examples, with the heads of their texts."""
        hidden = {"n", "reason", "text_id", "output_id", "distance", "bytes", *RECORD_FIELDS}
        shown = [column for column in self.staged.columns if column not in hidden]
        self.database.over(
            self.staged.read(*shown, *fields, "n", "reason"),
            "CREATE OR REPLACE TEMP TABLE shown AS"
            f" SELECT {', '.join(f's.{column}' for column in shown)}, e.tokens, e.side,"
            f" coalesce(s.reason, e.reason) AS reason, {', '.join(_head(f's.{field}') for field in fields)}"
            f" FROM (SELECT * FROM found WHERE {which}) s LEFT JOIN examples e USING (n)",
        )
        rows = [
            row for (row,) in self.database.rows("SELECT DISTINCT row FROM shown WHERE instruction IS NULL")
        ]
        if rows:
            with self.source.reading():
                self.database.rows(
                    f"UPDATE shown SET instruction = left(q.instruction, {SHOWN_CHARACTERS}) FROM"
                    f" (SELECT * FROM ({self.question}) WHERE row IN ({', '.join(map(str, rows))})) q"
                    " WHERE shown.row = q.row AND shown.instruction IS NULL"
                )
        found = self.database.connection.execute(f"SELECT * FROM shown ORDER BY {order}")
        names = [column[0] for column in found.description]
        every = [dict(zip(names, values, strict=True)) for values in found.fetchall()]
        return [{name: value for name, value in facts.items() if value is not None} for facts in every]


def _head(text: str) -> str:
    return f"left({text}, {SHOWN_CHARACTERS}) AS {text.split('.')[1]}"


def _explained(
    row: int, trace: int | None = None, reason: str | None = None, side: int = 0, **facts: Any
) -> str:
    where = f"row {row}" + (f", trace {trace}" if trace is not None else "")
    verdict = f"dropped: {reason}" if reason else {TRAIN: "kept for training", HELDOUT: "held out"}[side]
    return f"{where}: {verdict} ({', '.join(f'{name} {value!r}' for name, value in facts.items())})"


def case(checks: Iterable[tuple[str, str]]) -> str:
    """Return SQL for the reason of the first check that holds, or null."""
    return f"CASE {' '.join(f'WHEN {check} THEN {reason}' for check, reason in checks)} END"


def bin_end(tokens: int) -> int:
    """Return the end of the histogram bin of a count: 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ..."""
    step = max(1, 2 ** (max(tokens - 1, 1).bit_length() - 3))
    return -(-max(tokens, 1) // step) * step

"""System 1: instructions with their outputs, as DistilQwen_100k has them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from distill_app.core.errors import SchemaError
from distill_app.core.files import RECORD_FIELDS, Record
from distill_app.data.heldout import split_heldout
from distill_app.data.sources import Selection, iter_rows, require_records, writable_text


def prepare_instructions(
    dataset: str, slice_str: str, revision: str | None, heldout_fraction: float, seed: int
) -> tuple[list[Record], list[Record], dict[str, Any]]:
    """Load a slice of instructions and return (train, heldout, metrics).

    Raises:
        EmptyDataError: the slice has no rows, or none is left after selection.
        SchemaError: there is no `instruction` column.
        OSError, ValueError: see `load_rows`.
    """
    selection = read_instructions(iter_rows(dataset, slice_str, revision))
    require_records(selection, dataset, slice_str)
    train, heldout = split_heldout(selection.records, heldout_fraction, seed)
    metrics = {
        "rows_in": selection.rows_in,
        "train": len(train),
        "heldout": len(heldout),
        "dropped": selection.dropped,
    }
    return train, heldout, metrics


def read_instructions(rows: Iterable[Mapping[str, Any]]) -> Selection:
    """Take the usable rows; `input` and `output` are "" where absent or null.

    A row that has its text in `input` alone gives that as the instruction. Dropped and counted:
    "no instruction", "not text", "not writable text", and "duplicate" (the same instruction and
    input but for white space; punctuation tells `3 * 4` from `3 / 4`). The first one stays.

    Raises:
        SchemaError: a row has no `instruction` column.
    """
    records: list[Record] = []
    seen: set[tuple[str, ...]] = set()
    dropped: Counter[str] = Counter()
    rows_in = 0
    for rows_in, row in enumerate(rows, start=1):
        if "instruction" not in row:
            columns = ", ".join(map(str, row)) or "none"
            raise SchemaError(
                f"row {rows_in - 1}: found columns {columns}; expected instruction, output and"
                " optionally input; rename the columns"
            )
        try:
            record = _read_row(row)
        except ValueError as reason:
            dropped[str(reason)] += 1
            continue
        key = tuple(" ".join(record[field].split()) for field in ("instruction", "input"))
        if key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        records.append(record)
    return Selection(records, rows_in, dict(sorted(dropped.items())))


def _read_row(row: Mapping[str, Any]) -> Record:
    """Raises ValueError with the reason to drop the row."""
    record = {field: writable_text(row.get(field)) for field in RECORD_FIELDS}
    if not record["instruction"].strip():
        record |= {"instruction": record["input"], "input": ""}
    if not record["instruction"].strip():
        raise ValueError("no instruction")
    return record

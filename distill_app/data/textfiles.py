"""JSON, JSON lines and CSV: rows one at a time, and as typed Parquet, which all that follows reads."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_app.data.cells import mark, number, text
from distill_app.data.scratch import file_errors, named, shortened, told

if TYPE_CHECKING:
    import pyarrow as pa

MAX_TEXT_BYTES = 64 << 20  # of one JSON object or CSV line
READ_LETTERS = 1 << 20  # of a JSON list at a time
GROUP_BYTES = 8 << 20  # of rows that are written at a time
GROUP_ROWS = 4096
BOM = b"\xef\xbb\xbf"

VERIFIED = "thought_correctness_verify"
LEVELS = {"rv": "Reasoning_Verbosity", "cd": "Cognitive_Difficulty"}
TEXT_COLUMNS = ("instruction", "input", "output", "question", "problem", "cot", "response", "teacher")
LEVEL_COLUMNS = ("rv_score", "cd_score")
TRACE_TEXTS = ("full_response", "thought", "solution", "teacher")
CHAT_COLUMNS = ("messages", "conversations")
TURN_TEXTS = ("role", "content", "from", "value")
KNOWN_COLUMNS = (*TEXT_COLUMNS, *LEVEL_COLUMNS, VERIFIED, "reasoning", *CHAT_COLUMNS)


class Twice(dict[str, Any]):
    """A JSON object that says a thing twice."""


@dataclass
class Keys:
    """The keys of a file's rows, and of the traces within."""

    rows: dict[str, None] = field(default_factory=dict)
    traces: set[str] = field(default_factory=set)


def iter_rows(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield what each row of a text file holds, and its size in bytes or letters.

    Rows of CSV are dicts of text, an empty cell null. An object that says a thing twice is a `Twice`.

    Raises:
        FileNotFoundError, OSError, ValueError: see `file_errors`; the file and the place in it are named.
    """
    readers = {".csv": _csv_rows, ".jsonl": _json_lines, ".json": _json_lines}
    with file_errors(path):
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(BOM).lstrip()[:1]
        if path.suffix != ".csv" and head not in (b"[", b"{"):
            raise ValueError(
                f"{path}: cannot be read (it begins with neither [ nor {{);"
                " expected a list, or an object a line"
            )
        is_list = path.suffix != ".csv" and head == b"["
        yield from (_json_list if is_list else readers[path.suffix])(path)


def _fault(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path}: cannot be read ({shortened(fault)}); fix the file or fetch it again")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(pairs)


def _decoded(path: Path, place: str, line: str) -> Any:
    """Return the value of a JSON text, which must be writable as UTF-8."""
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as err:
        raise _fault(path, f"{place}, column {err.colno}: {err.msg}") from err
    except (ValueError, RecursionError) as err:  # a number of thousands of digits, thousands of brackets
        raise _fault(path, f"{place}: {told(err)}") from err
    _require_letters(path, place, line, value)
    return value


def _require_letters(path: Path, place: str, source: str, value: Any) -> None:
    if "\\u" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as err:
            raise _fault(path, f"{place}: a lone surrogate") from err


def _json_lines(path: Path) -> Iterator[tuple[Any, int]]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_TEXT_BYTES + 1):
            number += 1
            if len(line) > MAX_TEXT_BYTES:
                raise _fault(path, f"line {number}: over {MAX_TEXT_BYTES >> 20} MB")
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                letters = line.decode()
            except UnicodeDecodeError as err:
                raise _fault(path, f"line {number}: byte {err.start} is not UTF-8") from err
            yield _decoded(path, f"line {number}", letters), len(line)


def _json_list(path: Path) -> Iterator[tuple[Any, int]]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    with path.open(encoding="utf-8-sig") as file:
        letters = _Letters(path, file)
        letters.after("[")
        count = 0
        while letters.next() != "]":
            place = f"item {count}"
            if count:
                letters.after(",")
            letters.next()
            start, value = letters.at, None
            while True:
                try:
                    value, end = decoder.raw_decode(letters.text, letters.at)
                    if end < len(letters.text) or not letters.more():  # a number may go on
                        break
                except json.JSONDecodeError as err:
                    if not letters.more():
                        raise letters.fault(f"{place}: {err.msg}", err.pos) from err
                except (ValueError, RecursionError) as err:
                    raise letters.fault(f"{place}: {told(err)}", letters.at) from err
                start = letters.at
            letters.at = end
            _require_letters(path, place, letters.text[start:end], value)
            yield value, end - start
            count += 1
        letters.after("]")
        if letters.next():
            raise letters.fault("unexpected text after the list", letters.at)


class _Letters:
    """The text of a file, a stretch at a time."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.lines = "", 0, 1

    def more(self) -> bool:
        """Read on; return whether there was more, and that the stretch is not too long already."""
        if len(self.text) - self.at > MAX_TEXT_BYTES:
            raise self.fault(f"an item over {MAX_TEXT_BYTES >> 20} MB", self.at)
        new = self.file.read(max(READ_LETTERS, len(self.text) - self.at))
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def next(self) -> str:
        """Go to the next letter that is no white space and return it; an empty text at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def after(self, sign: str) -> None:
        """Go past a sign.

        Raises:
            ValueError: there is another one.
        """
        found = self.next()
        if found != sign:
            raise self.fault(
                f"unexpected {found!r}, expected {sign!r}" if found else "unexpected end of data", self.at
            )
        self.at += 1

    def fault(self, fault: str, at: int) -> ValueError:
        return _fault(self.path, f"line {self.lines + self.text.count(chr(10), 0, at)}, {fault}")


def _csv_rows(path: Path) -> Iterator[tuple[Any, int]]:
    before = csv.field_size_limit(MAX_TEXT_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header) or not header:
                raise ValueError(
                    f"{path}: cannot be read (header: {named(header)}); expected one name a column"
                )
            for cells in rows:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise _fault(
                        path, f"line {rows.line_num}: expected {len(header)} cells, found {len(cells)}"
                    )
                row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                yield row, sum(map(len, cells))
        except csv.Error as err:
            raise _fault(path, f"line {rows.line_num}: {err}") from err
        except UnicodeDecodeError as err:
            raise _fault(path, f"byte {err.start} is not UTF-8") from err
        finally:
            csv.field_size_limit(before)


def to_parquet(path: Path, target: Path, names: Mapping[str, str]) -> Keys:
    """Write the known columns of a text file as Parquet, each with its own type; return all keys.

    What is no text where one belongs becomes `NOT_TEXT`, what is no number or mark null. `fault` is why a row
    or trace cannot be taken, `malformed` why the file has another schema.

    Args:
        names: their name of each of our columns that has another in the file.
    """
    import pyarrow.parquet as pq

    keys, from_text = Keys(), path.suffix == ".csv"
    waiting: list[dict[str, Any]] = []
    size = 0
    schema = _schema()
    with pq.ParquetWriter(target, schema, use_dictionary=False, write_statistics=False) as writer:

        def write() -> None:
            writer.write_batch(_batch(waiting, schema))
            waiting.clear()

        for row, row_size in iter_rows(path):
            waiting.append(_typed(row, names, keys))
            size += row_size
            if size >= GROUP_BYTES or len(waiting) >= GROUP_ROWS:
                write()
                size = 0
        if from_text and not keys.rows:
            keys.rows.update(dict.fromkeys(_header(path)))
        write()
    return keys


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _batch(rows: list[dict[str, Any]], schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    return pa.RecordBatch.from_pylist(rows, schema)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    level = pa.struct([("level", pa.float64())])
    trace = [(name, pa.string()) for name in (*TRACE_TEXTS, "fault")]
    trace += [(VERIFIED, pa.bool_()), *((name, level) for name in LEVELS.values())]
    turns = pa.list_(pa.struct([(name, pa.string()) for name in TURN_TEXTS]))
    return pa.schema(
        [(name, pa.string()) for name in (*TEXT_COLUMNS, "fault", "malformed")]
        + [(name, pa.float64()) for name in LEVEL_COLUMNS]
        + [(VERIFIED, pa.bool_()), (f"{VERIFIED}_given", pa.bool_())]
        + [("reasoning", pa.list_(pa.struct(trace)))]
        + [(name, turns) for name in CHAT_COLUMNS]
    )


def _typed(row: Any, names: Mapping[str, str], keys: Keys) -> dict[str, Any]:
    if not isinstance(row, dict):
        return {"fault": "not an object"}
    keys.rows.update(dict.fromkeys(row))
    fault = "duplicated key" if isinstance(row, Twice) else None
    row = {ours: row.get(names.get(ours, ours)) for ours in KNOWN_COLUMNS}
    found: dict[str, Any] = {"fault": fault, **{name: text(row[name]) for name in TEXT_COLUMNS}}
    found |= {name: number(row[name], from_text=True) for name in LEVEL_COLUMNS}
    found[VERIFIED] = mark(row[VERIFIED], from_text=True)
    found[f"{VERIFIED}_given"] = row[VERIFIED] is not None
    for name in CHAT_COLUMNS:
        found[name] = _typed_turns(row[name])
    traces = row["reasoning"]
    if traces is None or isinstance(traces, list):
        found["malformed"] = next(
            (
                f"a trace is {_kind(t)}, expected an object"
                for t in traces or ()
                if not isinstance(t, dict | None)
            ),
            None,
        )
        found["reasoning"] = traces and [_typed_trace(trace, keys) for trace in traces]
    else:
        found["malformed"] = f"reasoning is {_kind(traces)}, expected a list"
    return found


def _typed_trace(trace: Any, keys: Keys) -> dict[str, Any] | None:
    if not isinstance(trace, dict):
        return None
    keys.traces.update(trace)
    found: dict[str, Any] = {name: text(trace.get(name)) for name in TRACE_TEXTS}
    found[VERIFIED] = mark(trace.get(VERIFIED))
    for name in LEVELS.values():
        level = trace.get(name)
        found[name] = {"level": number(level.get("level")) if isinstance(level, dict) else None}
    found["fault"] = "duplicated key" if isinstance(trace, Twice) else None
    return found


def _typed_turns(turns: Any) -> list[dict[str, Any]] | None:
    if not isinstance(turns, list):
        return None
    return [
        {name: text(turn.get(name)) if isinstance(turn, dict) else None for name in TURN_TEXTS}
        for turn in turns
    ]


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "a number")

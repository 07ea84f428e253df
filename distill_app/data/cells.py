"""What a cell holds, whatever its file made of it, as SQL.

A Parquet column has one type. Each value of a JSON row has its own: it comes as text, with the name of its
type in a column beside it, `NAME_kind`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_app.data.engine import literal

if TYPE_CHECKING:
    import pyarrow as pa

# What Python calls white space, which includes the separators of ASCII, without the blank and with it
ODD_SPACE = r"\t-\r\x{1c}-\x{1f}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
SPACE = rf"{ODD_SPACE}\x{{20}}"


def json_cells(value: str, names: Sequence[str], paths: Sequence[str]) -> str:
    """Return SQL with the fields of a JSON value as text and their types beside them.

    Reads the value twice however many fields there are; each reading holds a copy of it in memory.
    """
    fields = ", ".join(
        f'texts[{at}] AS "{name}", kinds[{at}] AS "{name}_kind"' for at, name in enumerate(names, start=1)
    )
    texts, kinds = (f"{read}({value}, {literal(paths)})" for read in ("json_extract_string", "json_type"))
    return (
        f"SELECT * EXCLUDE (texts, kinds), {fields} FROM (SELECT *, {texts} AS texts, {kinds} AS kinds FROM"
    )


def json_fault(expression: str) -> str:
    """Return SQL for why a JSON value is no object to read, or null."""
    keys = f"json_keys({expression})"
    return (
        f"CASE WHEN json_type({expression}) IS DISTINCT FROM 'OBJECT' THEN 'not an object'"
        f" WHEN len({keys}) <> len(list_distinct({keys})) THEN 'duplicated key' END"
    )


def kind_of(cell: str) -> str:
    """Return the column that names the type of a JSON row's cell."""
    return f'"{cell.strip(chr(34))}_kind"'


def text(cell: str, kind: "pa.DataType | None") -> str:
    """Return SQL for the cell's text; null where it is null or no text."""
    if kind is None:
        return "NULL::VARCHAR"
    if _is_json(kind):
        return f"CASE WHEN {kind_of(cell)} = 'VARCHAR' THEN {cell} END"
    return cell if is_text(kind) else "NULL::VARCHAR"


def is_not_text(cell: str, kind: "pa.DataType | None") -> str:
    """Return SQL for whether the cell holds something that is no text."""
    if kind is None or is_text(kind):
        return "false"
    if _is_json(kind):
        return f"coalesce({kind_of(cell)} NOT IN ('VARCHAR', 'NULL'), false)"
    return f"{cell} IS NOT NULL"


def number(cell: str, kind: "pa.DataType | None", from_text: bool = False) -> str:
    """Return SQL for the cell's number; null where it is none, or not a number.

    Args:
        from_text: a text that reads as a number is one, as in CSV.
    """
    import pyarrow.types as pt

    if kind is None:
        return "NULL::DOUBLE"
    if _is_json(kind):
        kinds = "('UBIGINT', 'BIGINT', 'DOUBLE'" + (", 'VARCHAR')" if from_text else ")")
        found = f"CASE WHEN {kind_of(cell)} IN {kinds} THEN try_cast({cell} AS DOUBLE) END"
    elif pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        found = f"{cell}::DOUBLE"
    elif from_text and is_text(kind):
        found = f"try_cast({cell} AS DOUBLE)"
    else:
        return "NULL::DOUBLE"
    return f"nullif({found}, 'nan'::DOUBLE)"


def truth(cell: str, kind: "pa.DataType | None", from_text: bool = False) -> str:
    """Return SQL for whether the cell says true (or 1) or false (or 0); null where it says neither."""
    import pyarrow.types as pt

    said = "NULL::BOOLEAN"
    if kind is not None and _is_json(kind):
        kinds = "('BOOLEAN', 'VARCHAR')" if from_text else "('BOOLEAN')"
        said = f"CASE WHEN {kind_of(cell)} IN {kinds} THEN try_cast({cell} AS BOOLEAN) END"
    elif kind is not None and (pt.is_boolean(kind) or (from_text and is_text(kind))):
        said = f"try_cast({cell} AS BOOLEAN)"
    return f"coalesce({said}, CASE {number(cell, kind, from_text)} WHEN 1 THEN true WHEN 0 THEN false END)"


def is_given(cell: str, kind: "pa.DataType | None") -> str:
    """Return SQL for whether the cell holds anything."""
    if kind is None:
        return "false"
    return f"coalesce({kind_of(cell)} <> 'NULL', false)" if _is_json(kind) else f"({cell} IS NOT NULL)"


def is_blank(cell: str) -> str:
    """Return SQL for whether a text is null, empty or white space."""
    return f"({cell} IS NULL OR NOT regexp_matches({cell}, '[^{SPACE}]'))"


def is_unwritable(cell: str) -> str:
    """Return SQL for whether a text has a NUL; that it is UTF-8 the engine has seen to."""
    return f"coalesce(contains({cell}, chr(0)), false)"


def collapsed(cell: str) -> str:
    """Return SQL for a text with single blanks for white space and none at its ends."""
    # A blank that stands alone is no match: each match costs as much as all the rest of a short text
    squeezed = f"trim(regexp_replace({cell}, '[{SPACE}]{{2,}}|[{ODD_SPACE}]', ' ', 'g'), ' ')"
    odd = f"regexp_matches({cell}, '[{ODD_SPACE}]|  |^ | $')"
    return f"CASE WHEN {odd} THEN {squeezed} ELSE {cell} END"


def asked_somewhere(rows: str) -> str:
    """Return SQL for the rows with the text of `input` as `instruction` where that is blank."""
    blank = is_blank("instruction")
    return (
        f"SELECT * REPLACE (CASE WHEN {blank} THEN input ELSE instruction END AS instruction,"
        f" CASE WHEN {blank} THEN '' ELSE coalesce(input, '') END AS input) FROM ({rows})"
    )


def is_text(kind: "pa.DataType") -> bool:
    """Return whether a column holds texts, however they lie in memory."""
    import pyarrow.types as pt

    return (
        pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_string_view(kind)
        or (pt.is_dictionary(kind) and is_text(kind.value_type))
    )


def _is_json(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return isinstance(kind, pa.JsonType)

"""Conversations: `messages` with role and content, or ShareGPT's `conversations` with from and value."""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distill_app.core.files import RECORD_FIELDS
from distill_app.data.cells import NOT_TEXT
from distill_app.data.tables import Batch
from distill_app.data.textfiles import CHAT_COLUMNS

if TYPE_CHECKING:
    pass

ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
KNOWN_ROLES = ("system", "user", "assistant")


def chat_column(names: Collection[str]) -> str | None:
    """Return which column holds conversations; None where there is none."""
    return next((name for name in CHAT_COLUMNS if name in names), None)


def with_records(batch: Batch) -> Batch:
    """Return a batch with instruction, input and output out of its conversations.

    What a system turn says stands before the question. `fault` says why a row has no such record: a student
    here learns single questions and answers, so a conversation of more turns is none.
    """
    import pyarrow as pa

    column = batch.columns[chat_column(batch.columns) or ""]
    before = batch.columns.get("fault")
    faults: list[str | None] = [None] * len(batch) if before is None else before.to_pylist()
    records = []
    for number, turns in enumerate(column.to_pylist()):
        record, fault = _record(turns)
        records.append(record)
        faults[number] = faults[number] or fault
    found = {
        name: pa.array([record[at] for record in records], pa.large_string())
        for at, name in enumerate(RECORD_FIELDS)
    }
    return replace(batch, columns=batch.columns | found | {"fault": pa.array(faults, pa.string())})


def _record(turns: Any) -> tuple[tuple[str, str, str], str | None]:
    """Return (instruction, input, output) of a conversation, or why it has none."""
    said: dict[str, str] = {}
    for turn in turns if isinstance(turns, list) and turns else [None]:
        role, content = _turn(turn)
        if role not in KNOWN_ROLES or not isinstance(content, str) or content == NOT_TEXT:
            return ("", "", ""), "not a conversation"
        if role in said:
            return ("", "", ""), "more than one turn"
        if "assistant" in said or (role == "system" and said):
            return ("", "", ""), "not a conversation"
        said[role] = content
    asked = said.get("user", "")
    instruction = (
        f"{said['system']}\n\n{asked}" if said.get("system", "").strip() and asked.strip() else asked
    )
    return (instruction, "", said.get("assistant", "")), None


def _turn(turn: Any) -> tuple[Any, Any]:
    if not isinstance(turn, dict):
        return None, None
    role = turn["role"] if turn.get("role") is not None else turn.get("from")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    return ROLES.get(role, role) if isinstance(role, str) else role, content

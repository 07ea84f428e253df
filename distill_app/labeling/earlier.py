"""The answers of versions that kept them in one SQLite file."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from distill_app.labeling.segments import as_line

IS_OURS = (0x64697374, 1)  # application_id and user_version in the file's header
RECIPES = "SELECT digest, used_at, teacher, identity, sampling FROM recipes"
ANSWERS = """SELECT answers.id, key, max_new_tokens, lower(substr(hex(digest), 1, 12)),
    text, tokens, finish_reason, prompt_tokens
    FROM answers JOIN recipes ON recipe = recipes.id ORDER BY answers.id"""


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield what the file holds as lines of a segment; the file is only read.

    Raises:
        ValueError: it is damaged, or no store of answers.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            header = [
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            ]
            if tuple(header) != IS_OURS:
                raise ValueError(
                    f"{path}: found another program's file, expected a store of answers; move it"
                )
            for digest, *body in db.execute(RECIPES):
                yield as_line("recipe", 0, digest, body)
            for number, key, *body in db.execute(ANSWERS):
                yield as_line("answer", number << 32, key, body)
    except sqlite3.Error as err:
        raise ValueError(
            f"{path}: found no readable store of answers ({err}); move the file away, or set label.store to"
            " another place"
        ) from err

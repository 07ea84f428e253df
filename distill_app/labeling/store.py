"""The answers that were paid for: one SQLite file that several runs may share.

An answer's key is a hash of what determines it: the engine's identity, the sampling and the prompt. The
token limit stands beside the key, since an answer that ended by itself below a limit is the answer under
that limit too, and raising the limit must ask again only what was cut.

A run claims a prompt before it asks, in the store, so that no other run asks it as well. A claim ends with
its answer, with its run, or with the death of the run's process.
"""

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from distill_app.generation.answers import Answer, Engine, Sampling

APPLICATION_ID = 0x64697374  # "dist", in the file's header: another program's database is not ours
SCHEMA_VERSION = 1
BUSY_SEC = 60.0  # how long one statement waits for another process's transaction
HEARTBEAT_SEC = 10.0
DEAD_AFTER_SEC = 60.0  # without a heartbeat, where the process cannot be looked up
KEYS_A_QUERY = 500
# SQLite's write-ahead log needs memory shared by all users of the file, so one machine.
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse", "lustre", "beegfs", "ceph", "gpfs", "afs")

ELSEWHERE = "set label.store to a place that can be written"

SCHEMA = """
CREATE TABLE recipes (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    teacher TEXT NOT NULL,
    identity TEXT NOT NULL,
    sampling TEXT NOT NULL,
    used_at REAL NOT NULL
);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    max_new_tokens INTEGER NOT NULL,
    recipe INTEGER NOT NULL REFERENCES recipes (id),
    text TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    UNIQUE (key, max_new_tokens)
);
CREATE INDEX answers_by_recipe ON answers (recipe);
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    process_start REAL NOT NULL,
    heartbeat REAL NOT NULL
);
CREATE TABLE claims (
    key BLOB NOT NULL,
    max_new_tokens INTEGER NOT NULL,
    run TEXT NOT NULL,
    PRIMARY KEY (key, max_new_tokens)
) WITHOUT ROWID;
"""

# A cut answer is the answer under its own limit alone, unless the model's context cut it before. A refusal
# may be for want of room, so it says nothing about smaller limits; nor does an answer whose tokens its server
# did not count.
SERVES = """CASE
    WHEN finish_reason = 'length' AND (tokens = 0 OR tokens >= max_new_tokens) THEN max_new_tokens = :limit
    WHEN finish_reason = 'refused' OR tokens = 0 THEN max_new_tokens <= :limit
    ELSE tokens <= :limit END"""


@dataclass(frozen=True)
class Recipe:
    """What determines an answer beside the prompt and the token limit."""

    teacher: str  # a name for people; not part of the key
    identity: str  # JSON
    sampling: str  # JSON

    @classmethod
    def of(cls, engine: Engine, sampling: Sampling) -> "Recipe":
        """Return the recipe of an engine's answers."""
        return cls(engine.teacher, _canonical(engine.identity), _canonical(sampling.determining()))

    @property
    def digest(self) -> bytes:
        """32 bytes, of identity and sampling."""
        return hashlib.sha256(f"{self.identity}\n{self.sampling}".encode()).digest()

    def key(self, prompt: str) -> bytes:
        """Return the 32 bytes under which the answer to a prompt is stored."""
        return hashlib.sha256(self.digest + prompt.encode("utf-8", "surrogatepass")).digest()


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Summary:
    """What the store holds of one recipe."""

    id: str  # 12 hexadecimal digits of the recipe's digest
    teacher: str
    identity: dict[str, Any]
    sampling: dict[str, Any]
    answers: int
    tokens: int  # generated
    used_at: float  # Unix time of the last run that used it, seconds


@dataclass(frozen=True)
class Claimed:
    """What became of the keys that a run wanted to ask."""

    mine: set[bytes]  # to be asked by this run, now
    answered: set[bytes]
    theirs: set[bytes]  # being asked by another run that lives


class AnswerStore:
    """Answers by key in an SQLite file; several processes and threads may use one file at once.

    Args:
        path: the file, made where it is missing; None keeps the answers in memory.
        must_exist: a missing file is an error.

    Raises (every method):
        FileNotFoundError: there is no such file and there must be.
        OSError: the place cannot be written, the disk is full, or another process blocks the file.
        ValueError: the file is damaged, of a newer version, or no store.
    """

    def __init__(self, path: str | os.PathLike[str] | None, must_exist: bool = False) -> None:
        self.path = None if path is None or str(path) == ":memory:" else Path(path)
        self.name = str(self.path or "memory")
        self.run = uuid.uuid4().hex
        self._recipe_ids: dict[bytes, int] = {}
        self._passing: dict[tuple[bytes, int], Answer] = {}  # of this run alone, by key and limit
        self._lock = threading.RLock()  # an engine may pull prompts from a thread of its own
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        if must_exist and self.path and not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such store; label something, or mend the path")
        with self._errors():
            self._db = self._open()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is claimed and close the file; called once."""
        self._stop.set()
        if self._heart:
            self._heart.join()
        with self._lock:
            if self._heart:
                with contextlib.suppress(sqlite3.Error):  # a full disk; the claims die with the process
                    self._db.execute("DELETE FROM claims WHERE run = ?", (self.run,))
                    self._db.execute("DELETE FROM runs WHERE id = ?", (self.run,))
            self._db.close()

    def answers(self, keys: Iterable[bytes], limit: int) -> dict[bytes, Answer]:
        """Return the stored answers to keys under a token limit; what is not there is left out.

        Where several would serve, it is the oldest: an answer once given stays the answer.
        """
        query = "SELECT id, key, text, tokens, finish_reason, prompt_tokens FROM answers"
        keys = set(keys)
        found = {key: self._passing[key, limit] for key in keys if (key, limit) in self._passing}
        with self._errors():
            for _, key, *fields in sorted(self._rows(f"{query} WHERE {SERVES} AND key IN", keys, limit)):
                found.setdefault(key, Answer(*fields))
        return found

    def answered(self, keys: Iterable[bytes], limit: int) -> set[bytes]:
        """Return which keys have an answer under a token limit."""
        with self._errors():
            query = f"SELECT key FROM answers WHERE {SERVES} AND key IN"
            keys = set(keys)
            stored = {key for (key,) in self._rows(query, keys, limit)}
        return stored | {key for key in keys if (key, limit) in self._passing}

    def claim(self, keys: Iterable[bytes], limit: int) -> Claimed:
        """Claim the keys that neither have an answer nor are claimed; what dead runs hold is taken over.

        A key that this very run has claimed before is in none of the three sets.
        """
        self._start_heart()
        wanted = set(keys)
        with self._transaction():
            answered = self.answered(wanted, limit)
            holders = self._holders(wanted - answered, limit)
            free = wanted - answered - set(holders)
            self._db.executemany(
                "INSERT INTO claims VALUES (?, ?, ?)", [(key, limit, self.run) for key in sorted(free)]
            )
        theirs = {key for key, run in holders.items() if run != self.run}
        return Claimed(free, answered, theirs)

    def look(self, keys: Iterable[bytes], limit: int) -> tuple[set[bytes], set[bytes]]:
        """Return which keys are answered by now, and which are still claimed by a run that lives."""
        wanted = set(keys)
        with self._transaction():
            answered = self.answered(wanted, limit)
            return answered, set(self._holders(wanted - answered, limit))

    def holders(self) -> list[str]:
        """Return the other runs that live and label with the store, for people: process and host of each."""
        with self._transaction():
            self._bury_dead_runs()
            query = "SELECT pid, host FROM runs WHERE id != ? ORDER BY heartbeat"
            rows = self._db.execute(query, (self.run,)).fetchall()
        return [f"process {pid} on {host.split('/')[0]}" for pid, host in rows]

    def put(self, recipe: Recipe, key: bytes, limit: int, answer: Answer) -> None:
        """Store an answer and end its claim; an answer that is there already stays.

        One that does not last is kept for this run alone.
        """
        if not answer.lasting:
            self._passing[key, limit] = answer
            with self._transaction():
                self._db.execute("DELETE FROM claims WHERE key = ? AND max_new_tokens = ?", (key, limit))
            return
        # UTF-8 has no lone surrogates; a server's JSON may.
        text = answer.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        row = (key, limit, text, answer.tokens, answer.finish_reason, answer.prompt_tokens)
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO answers"
                " (key, max_new_tokens, text, tokens, finish_reason, prompt_tokens, recipe)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*row, self._recipe_id(recipe)),
            )
            self._db.execute("DELETE FROM claims WHERE key = ? AND max_new_tokens = ?", (key, limit))

    def use(self, recipe: Recipe) -> None:
        """Note that this run uses a recipe now: pruning goes by it, and waits for the run's end."""
        self._start_heart()
        with self._transaction():
            self._db.execute(
                "INSERT INTO recipes (digest, teacher, identity, sampling, used_at) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (digest) DO UPDATE SET used_at = excluded.used_at, teacher = excluded.teacher",
                (recipe.digest, recipe.teacher, recipe.identity, recipe.sampling, time.time()),
            )

    def release_claims(self) -> None:
        """Give up what this run has claimed and not answered."""
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE run = ?", (self.run,))

    def summaries(self) -> list[Summary]:
        """Return what is in the store, the recipe used last first."""
        with self._errors():
            rows = self._db.execute(
                "SELECT digest, teacher, identity, sampling,"
                " count(answers.id), coalesce(sum(tokens), 0), used_at"
                " FROM recipes LEFT JOIN answers ON recipe = recipes.id GROUP BY recipes.id"
                " ORDER BY used_at DESC, recipes.id"
            ).fetchall()
        return [
            Summary(digest.hex()[:12], teacher, json.loads(identity), json.loads(sampling), *rest)
            for digest, teacher, identity, sampling, *rest in rows
        ]

    def size_bytes(self) -> int:
        """Return the size of the file and of SQLite's log beside it; 0 in memory."""
        files = [Path(f"{self.path}{end}") for end in ("", "-wal", "-shm")] if self.path else []
        return sum(file.stat().st_size for file in files if file.exists())

    def prune(self, recipe_id: str | None = None, older_than_days: float | None = None) -> list[Summary]:
        """Remove recipes with all their answers, give the space back, and return what was removed.

        Args:
            recipe_id: the start of a recipe's id, as `summaries` gives it.
            older_than_days: only recipes that no run has used for so long. With both, both must hold.

        Raises:
            ValueError: nothing was chosen, the id fits no recipe or several, or a run is using the store.
        """
        if recipe_id is None and older_than_days is None:
            raise ValueError("prune: found no choice, expected a recipe, an age in days, or both")
        with self._transaction():
            if live := self.holders():
                raise ValueError(f"{self.name}: {live[0]} is labelling with it; prune when that has ended")
            gone = _chosen(self.summaries(), recipe_id, older_than_days)
            for summary in gone:
                where = "WHERE substr(hex(digest), 1, 12) = upper(?)"
                chosen = f"(SELECT id FROM recipes {where})"
                self._db.execute(f"DELETE FROM answers WHERE recipe IN {chosen}", (summary.id,))
                self._db.execute(f"DELETE FROM recipes {where}", (summary.id,))
        self._recipe_ids.clear()
        with self._errors():
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return gone

    def prune_refused(self) -> int:
        """Remove what engines refused to answer, so that they are asked again; return how many there were.

        Raises:
            ValueError: a run is using the store.
        """
        with self._transaction():
            if live := self.holders():
                raise ValueError(f"{self.name}: {live[0]} is labelling with it; prune when that has ended")
            return self._db.execute("DELETE FROM answers WHERE finish_reason = 'refused'").rowcount

    def _open(self) -> sqlite3.Connection:
        if self.path:
            if self.path.is_dir():
                raise ValueError(f"{self.path}: is a folder, expected a store's file; mend the path")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise OSError(f"{self.path}: cannot be written ({err.strerror}); {ELSEWHERE}") from err
        db = sqlite3.connect(
            str(self.path or ":memory:"),
            timeout=BUSY_SEC,
            isolation_level=None,  # transactions are begun by hand
            check_same_thread=False,
        )
        try:
            self._check(db)
        except BaseException:
            db.close()
            raise
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        """Make sure that the file is ours, before anything in it is changed; fill an empty one."""
        if _has_tables(db):
            if _pragma(db, "application_id") != APPLICATION_ID:
                raise ValueError(
                    f"{self.path}: another program's database, expected a store of answers;"
                    " set label.store to another place"
                )
            if (version := _pragma(db, "user_version")) != SCHEMA_VERSION:
                raise ValueError(
                    f"{self.path}: found version {version} of the store, expected {SCHEMA_VERSION};"
                    " use the project's version that made it, or set label.store to another place"
                )
        _set_journal(db, "TRUNCATE" if self.path and _is_on_network(self.path) else "WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last answers, never the file
        if _has_tables(db):
            return
        with _write_lock(db):
            if not _has_tables(db):  # another process may have been quicker
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the write lock, for several statements as one; a block within a block is part of it."""
        with self._errors():
            if self._db.in_transaction:
                yield
                return
            with _write_lock(self._db):
                yield

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn SQLite's errors into one line: where, what, and what to do."""
        try:
            with self._lock:
                yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise  # our own defect
        except sqlite3.Error as err:
            raise _explained(self.name, err) from err

    def _recipe_id(self, recipe: Recipe) -> int:
        digest = recipe.digest
        if digest not in self._recipe_ids:
            found = self._db.execute("SELECT id FROM recipes WHERE digest = ?", (digest,)).fetchone()
            if not found:
                self.use(recipe)
                return self._recipe_id(recipe)
            self._recipe_ids[digest] = found[0]
        return self._recipe_ids[digest]

    def _holders(self, keys: set[bytes], limit: int) -> dict[bytes, str]:
        """Return the run that holds each claimed key, dead runs being forgotten first."""
        query = "SELECT key, run FROM claims WHERE max_new_tokens = :limit AND key IN"
        held: dict[bytes, str] = dict(self._rows(query, keys, limit))
        if any(run != self.run for run in held.values()):
            self._bury_dead_runs()
            held = dict(self._rows(query, keys, limit))
        return held

    def _rows(self, query: str, keys: Iterable[bytes], limit: int) -> list[tuple[Any, ...]]:
        """Return the rows of a query that ends where its list of keys begins."""
        ordered = sorted(keys)
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(ordered), KEYS_A_QUERY):
            values = {f"k{n}": key for n, key in enumerate(ordered[start : start + KEYS_A_QUERY])}
            marks = ",".join(f":{name}" for name in values)
            rows += self._db.execute(f"{query} ({marks})", {"limit": limit, **values}).fetchall()
        return rows

    def _bury_dead_runs(self) -> None:
        for run, *process in self._db.execute("SELECT * FROM runs WHERE id != ?", (self.run,)).fetchall():
            if not _lives(*process):
                self._db.execute("DELETE FROM claims WHERE run = ?", (run,))
                self._db.execute("DELETE FROM runs WHERE id = ?", (run,))
        self._db.execute("DELETE FROM claims WHERE run NOT IN (SELECT id FROM runs)")

    def _start_heart(self) -> None:
        """Enter this run where others see it, and keep its entry fresh."""
        if self._heart or not self.path:
            return
        entry = (self.run, _host(), os.getpid(), psutil.Process().create_time(), time.time())
        with self._transaction():
            self._bury_dead_runs()
            self._db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", entry)
        self._heart = threading.Thread(target=self._beat, args=(entry,), name="answer store", daemon=True)
        self._heart.start()

    def _beat(self, entry: tuple[Any, ...]) -> None:
        while not self._stop.wait(HEARTBEAT_SEC):
            with contextlib.suppress(sqlite3.Error), self._lock:
                # As a whole: a run that slept too long was buried
                self._db.execute(
                    "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", (*entry[:-1], time.time())
                )


def _explained(name: str, err: sqlite3.Error) -> Exception:
    code = getattr(err, "sqlite_errorname", "")
    if code == "SQLITE_FULL":
        return OSError(f"{name}: the disk is full; free some space and run again, what was stored stays")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return OSError(f"{name}: another process blocks it for over {BUSY_SEC:.0f} s; end that one first")
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return OSError(f"{name}: cannot be written ({err}); {ELSEWHERE}")
    if code.startswith("SQLITE_IOERR"):
        return OSError(f"{name}: {err}; see to the disk and run again, what was stored stays")
    return ValueError(
        f"{name}: found no readable store of answers ({err}); move the file away, or {ELSEWHERE}"
    )


def _chosen(summaries: list[Summary], recipe_id: str | None, days: float | None) -> list[Summary]:
    chosen = summaries
    if recipe_id is not None:
        chosen = [s for s in summaries if s.id.startswith(recipe_id.lower())]
        if len(chosen) != 1:
            known = ", ".join(s.id for s in summaries) or "none"
            raise ValueError(
                f"recipe {recipe_id!r}: fits {len(chosen)} recipes, expected one; there are: {known}"
            )
    if days is not None:
        chosen = [s for s in chosen if s.used_at <= time.time() - days * 86400]
    return chosen


def _host() -> str:
    """Return a name that two machines, or two containers with process numbers of their own, do not share."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}/{space}"


def _lives(host: str, pid: int, process_start: float, heartbeat: float) -> bool:
    """Tell whether a run's process lives: by the process where it is ours to see, else by its heartbeat."""
    if host == _host():
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # A set clock moves the start by a little, and a reused number by a lot.
            if abs(process.create_time() - process_start) < 2:
                return True
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            pass
    return time.time() - heartbeat < DEAD_AFTER_SEC


def _is_on_network(path: Path) -> bool:
    place = path.absolute().parent
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    for folder in (place, *place.parents):
        if folder in mounts:
            return mounts[folder].startswith(NETWORK_FILE_SYSTEMS)
    return False


def _set_journal(db: sqlite3.Connection, mode: str) -> None:
    """SQLite does not wait for other users when the mode changes, so wait here."""
    until = time.monotonic() + BUSY_SEC
    while _pragma(db, "journal_mode") not in (mode.lower(), "memory"):
        try:
            if db.execute(f"PRAGMA journal_mode = {mode}").fetchone()[0] != mode.lower():
                return  # a file system without shared memory; SQLite's own choice is safe there
        except sqlite3.OperationalError as err:
            if "locked" not in str(err) or time.monotonic() > until:
                raise
            time.sleep(0.05)


def _pragma(db: sqlite3.Connection, name: str) -> Any:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _has_tables(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


@contextlib.contextmanager
def _write_lock(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back by itself where the disk is full
            db.execute("ROLLBACK")
        raise

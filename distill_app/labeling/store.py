"""The answers that were paid for: a folder of segments that any number of runs, users and machines share.

A run appends to a segment of its own and reads those of all others; nothing is locked, and what is written
is never changed. An answer's key is a hash of what determines it: the engine's identity, the sampling and the
prompt. The token limit stands beside the key, since an answer that ended by itself below a limit is the
answer under that limit too, and raising the limit must ask again only what was cut.

Each answer has a number above all that its run had seen. Of several answers to one question, the one with the
lowest number is the answer, for everybody and for good.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from distill_app.core.files import new_file
from distill_app.generation.answers import Answer, Engine, Sampling
from distill_app.labeling.earlier import lines_of
from distill_app.labeling.progress import tell
from distill_app.labeling.segments import (
    BODY,
    HEAD,
    KEY,
    KIND,
    NUMBER,
    SUFFIX,
    Index,
    Record,
    Segment,
    as_line,
    as_record,
    read_records,
)

# Between writes that wait for the disk: a power cut may cost answers, the end of a process none
SYNC_SEC = 1.0
USED_EVERY_SEC = 86400.0  # how exactly the last use of a recipe is known
PLACE_BITS = 40  # of a place, those that tell where in its segment: up to 1 TB
ATTEMPTS = 100  # at reading a folder whose segments are being compacted
GONE = (errno.ENOENT, errno.ESTALE)
FULL = (errno.ENOSPC, errno.EDQUOT)
END = as_line("end", 0, bytes(32), None)


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
    used_at: float  # Unix time of the last run that used it, seconds, to a day


class AnswerStore:
    """Answers by key in a folder of segments; several processes and threads may use one folder at once.

    Args:
        path: the folder, made where it is missing. An SQLite file of earlier versions, here or beside it with
            `.sqlite` behind its name, is copied into the folder. None keeps the answers until `close`.
        must_exist: a missing folder is an error.

    Raises (every method):
        FileNotFoundError: there is no such folder and there must be.
        OSError: the place cannot be read or written, or the disk is full.
        ValueError: the path is a URL, or a file that is no store.
    """

    def __init__(self, path: str | os.PathLike[str] | None, must_exist: bool = False) -> None:
        self._scratch = tempfile.TemporaryDirectory() if path is None or str(path) == ":memory:" else None
        self.path: Path | None = None
        earlier: Path | None = None
        if not self._scratch:
            self.path, earlier = _places(str(path))
        self._folder = self.path or Path(self._scratch.name if self._scratch else "")
        self.name = str(self.path or "memory")
        self._run = uuid.uuid4().int >> 96  # 32 bits in each of its numbers, so that no two are the same
        self._own: Path | None = None  # this run's segment, once it has written
        self._named: set[str] = set()  # the recipes that it names
        self._number = 0  # the highest that was seen
        self._synced = 0.0
        self._passing: dict[tuple[bytes, int], Answer] = {}  # of this run alone, by key and limit
        self._lock = threading.RLock()  # an engine may pull prompts from a thread of its own
        self._forget()
        if must_exist and not os.path.isdir(self._folder) and not (earlier and os.path.isfile(earlier)):
            raise FileNotFoundError(f"{self.name}: no such store; label something, or fix the path")
        with self._errors():
            if not os.path.isdir(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):  # a file system without modes
                    self._folder.chmod(0o2775)
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if earlier and os.path.isfile(earlier):
                self._take_over(earlier)

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End this run's segment; called once."""
        with contextlib.suppress(OSError):  # a full disk; the segment counts as ended when it is old
            self._end()
        if self._scratch:
            self._scratch.cleanup()

    def answers(self, keys: Iterable[bytes], limit: int) -> dict[bytes, Answer]:
        """Return the answers to keys under a token limit, as far as any run has stored them by now.

        Where several would serve, it is the one with the lowest number: an answer once given stays.
        """
        wanted = set(keys)
        found = {key: self._passing[key, limit] for key in wanted if (key, limit) in self._passing}
        with self._errors():
            for record in self._look(wanted):
                if record.serves(limit):
                    found.setdefault(record.key, record.answer)
        return found

    def take(self, keys: Iterable[bytes], limit: int) -> tuple[set[bytes], set[bytes]]:
        """Return the keys that lack an answer: those to ask now, and those that another run set out to ask.

        The first are noted, so that other runs ask something else before. A note binds nobody: where two runs
        ask the same at once, that costs an answer and changes none.
        """
        with self._errors():
            wanted = set(keys)
            lacking = wanted - set(self.answers(wanted, limit))
            theirs = {key for key in lacking if self._asking.get(_head(key), self._own) != self._own}
            mine = lacking - theirs
            self._append([as_line("question", 0, key, limit) for key in sorted(mine)])
        return mine, theirs

    def put(self, recipe: Recipe, key: bytes, limit: int, answer: Answer) -> None:
        """Store an answer; one that is there already stays the answer.

        One that does not last is kept for this run alone.
        """
        if not answer.lasting:
            self._passing[key, limit] = answer
            return
        # UTF-8 has no lone surrogates; a server's JSON may.
        text = answer.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        body = [limit, _id(recipe), text, answer.tokens, answer.finish_reason, answer.prompt_tokens]
        with self._errors():
            number = ((self._number >> 32) + 1) << 32 | self._run
            self._append([as_line("answer", number, key, body)], recipe)
            self._number = max(self._number, number)

    def use(self, recipe: Recipe) -> None:
        """Note that a run uses a recipe, unless one has today: pruning goes by it."""
        with self._errors():
            self._look()
            line = self._recipes.get(_id(recipe))
            if line is None or _summary(line).used_at < time.time() - USED_EVERY_SEC:
                self._append([], recipe)

    def summaries(self) -> list[Summary]:
        """Return what is in the store, the recipe used last first; every answer is read for it."""
        with self._errors():
            self._look()
            counts = {name: [0, 0] for name in self._recipes}
            for segment in list(self._segments.values()):
                for record, _ in self._valid(segment):
                    count = counts.get(record.recipe, [0, 0])  # its line may be damaged
                    count[:] = count[0] + 1, count[1] + record.answer.tokens
            found = [_summary(self._recipes[name], *count) for name, count in counts.items()]
        return sorted(found, key=lambda one: (-one.used_at, one.id))

    def size_bytes(self) -> int:
        """Return the size of all segments; 0 in memory."""
        return sum(file.stat().st_size for file in self._folder.glob(f"*{SUFFIX}")) if self.path else 0

    def in_use(self) -> list[Path]:
        """Return the segments of other runs that have not ended; one that was killed ends after a day."""
        with self._errors():
            self._look()
            return [one.path for one in self._segments.values() if one.path != self._own and one.in_use()]

    def compact(self, keep: Callable[[Record], bool] = lambda record: True) -> int:
        """Copy all segments that are not in use into one, then remove them; return how much `keep` left out.

        Runs may go on meanwhile: what is removed is in the new one, and who finds a file gone looks again.
        Answers that another precedes and damaged lines are left out.
        """
        with self._errors():
            self._end()
            self._look()
            old: dict[Segment, int] = {}
            for segment in self._segments.values():
                with contextlib.suppress(FileNotFoundError):  # another compaction was quicker
                    if not segment.in_use():
                        old[segment] = segment.path.stat().st_size
            left_out, recipes = 0, set()
            with self._new_segment() as file:
                for record, line in (found for segment in old for found in self._valid(segment)):
                    if keep(record):
                        recipes.add(record.recipe)
                        file.write(b"\n" + line)
                    else:
                        left_out += 1
                file.writelines(
                    b"\n" + self._recipes[name] for name in sorted(recipes & self._recipes.keys())
                )
            for segment, size in old.items():
                with contextlib.suppress(FileNotFoundError):
                    if segment.path.stat().st_size == size:
                        segment.path.unlink()
        return left_out

    def prune(self, recipe_id: str | None = None, older_than_days: float | None = None) -> list[Summary]:
        """Remove recipes with all their answers, give the space back, and return what was removed.

        Args:
            recipe_id: the start of a recipe's id, as `summaries` gives it.
            older_than_days: only recipes that no run has used for so long. With both, both must hold.

        Raises:
            ValueError: nothing was chosen, the id fits no recipe or several, or a run is using the recipe.
        """
        if recipe_id is None and older_than_days is None:
            raise ValueError("prune: found no choice, expected a recipe, an age in days, or both")
        with self._errors():
            self._end()
            gone = _chosen(self.summaries(), recipe_id, older_than_days)
            names = {summary.id for summary in gone}
            for segment in self._segments.values():
                if names & segment.recipes and segment.in_use():
                    raise ValueError(
                        f"{segment.path}: a run is labelling with that recipe; prune when it has ended (a"
                        " killed run counts as ended after a day)"
                    )
            self.compact(lambda record: record.recipe not in names)
        return gone

    def prune_refused(self) -> int:
        """Remove what engines refused to answer, so that it is asked again; return how many there were."""
        return self.compact(lambda record: record.answer.finish_reason != "refused")

    def _forget(self) -> None:
        """Begin anew with reading the folder."""
        self._segments: dict[str, Segment] = {}
        self._by_place: list[Segment] = []
        self._index = Index()
        self._recipes: dict[str, bytes] = {}  # by id, the line that tells of its last use
        self._asking: dict[int, Path] = {}  # by head of the key, the segment that notes an open question

    def _look(self, keys: Iterable[bytes] = ()) -> list[Record]:
        """Read what any run has written since the last time; return the stored answers to keys in order."""
        for _ in range(ATTEMPTS):
            try:
                names = sorted(one.name for one in os.scandir(self._folder) if one.name.endswith(SUFFIX))
                if not self._segments.keys() <= set(names):
                    self._forget()
                for name in names:
                    self._read(name)
                places = sorted((place, key) for key in keys for place in self._index.find(_head(key)))
                by_segment = groupby(places, key=lambda one: one[0] >> PLACE_BITS)
                return sorted(
                    record
                    for place, some in by_segment
                    for record in read_records(
                        self._by_place[place].path, [(at & ((1 << PLACE_BITS) - 1), key) for at, key in some]
                    )
                )
            except OSError as err:
                if err.errno not in GONE or not os.path.isdir(self._folder):
                    raise
            self._forget()  # a segment was compacted between the listing and the reading
            time.sleep(0.05)
        raise OSError(f"{self.name}: its files come and go; run again when nobody compacts it")

    def _read(self, name: str) -> None:
        """Read what is new in a segment."""
        if name not in self._segments:
            self._segments[name] = Segment(self._folder / name, len(self._by_place))
            self._by_place.append(self._segments[name])
        segment = self._segments[name]
        if segment.is_ended:
            return
        fault = segment.fault
        for start, line in segment.new_lines():
            kind, head = line[KIND], int(line[HEAD], 16)
            if kind == b"a":
                self._index.add(head, segment.place << PLACE_BITS | start)
                self._asking.pop(head, None)
                self._number = max(self._number, int(line[NUMBER], 16))
            elif kind == b"q":
                self._asking[head] = segment.path
            elif kind == b"r":
                new = _summary(line)
                segment.recipes.add(new.id)
                if new.id not in self._recipes or _summary(self._recipes[new.id]).used_at < new.used_at:
                    self._recipes[new.id] = line
            else:
                segment.is_ended = True
                self._asking = {head: path for head, path in self._asking.items() if path != segment.path}
        if segment.fault and segment.fault != fault:
            tell(f"{segment.path}: left out {segment.fault}; what it answered is asked again")

    def _valid(self, segment: Segment) -> Iterator[tuple[Record, bytes]]:
        """Yield the answers of a segment with their lines, but for those that another one precedes."""
        with contextlib.suppress(FileNotFoundError):  # compacted by another
            for start, line in Segment(segment.path).new_lines():
                if line[KIND] != b"a":
                    continue
                record = as_record(segment.path.name, start, line)
                has_rivals = len(self._index.find(int(line[HEAD], 16))) > 1
                rivals = self._look([record.key]) if has_rivals else []
                if not any(other.limit == record.limit and other < record for other in rivals):
                    yield record, line

    def _append(self, lines: list[bytes], recipe: Recipe | None = None) -> None:
        """Write lines to this run's segment, and before them the recipe where the segment does not name it.

        The file is opened for each write: closing it makes the lines visible to other machines on a network
        file system, and a file that is gone is noticed.
        """
        if not lines and not recipe:
            return
        is_due = time.monotonic() - self._synced > SYNC_SEC
        file = self._open_own()
        try:
            if recipe and _id(recipe) not in self._named:
                body = [time.time(), recipe.teacher, recipe.identity, recipe.sampling]
                lines = [as_line("recipe", 0, recipe.digest, body), *lines]
            content = memoryview(b"".join(lines))
            while content:
                content = content[os.write(file, content) :]
            if is_due:
                os.fsync(file)
        finally:
            os.close(file)
        self._named |= {_id(recipe)} if recipe else set()
        if is_due:
            self._synced = time.monotonic()
            self._look()  # so that the next number is above those of other runs

    def _open_own(self) -> int:
        if self._own:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self._own, os.O_WRONLY | os.O_APPEND)
        self._own, self._named = self._new_path(), set()
        file = os.open(self._own, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o664)
        _share(file)
        return file

    def _end(self) -> None:
        with self._errors():
            if self._own:
                self._synced = 0.0
                self._append([END])
                self._own = None

    def _new_path(self) -> Path:
        """Return the path of a new segment: when, and for people on which machine and by which process."""
        host = re.sub(r"[^\w.]", "_", socket.gethostname())
        made = f"{time.time_ns() // 1_000_000}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        return self._folder / f"{made}{SUFFIX}"

    @contextlib.contextmanager
    def _new_segment(self) -> Iterator[BinaryIO]:
        """Give a file that becomes a segment as a whole, or not at all."""
        with new_file(self._new_path()) as file:
            _share(file.fileno())
            yield file
            file.write(END)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut may undo the renaming, and not the removal of what was copied
        finally:
            os.close(folder)

    def _take_over(self, earlier: Path) -> None:
        """Copy an SQLite file once, and again where an earlier version of the project has changed it."""
        state = earlier.stat()
        mark = self._folder / f".{earlier.name}-{state.st_mtime_ns}-{state.st_size}.taken"
        if not mark.exists():
            with self._new_segment() as file:
                file.writelines(lines_of(earlier))
            mark.touch()
            tell(f"{earlier}: its answers are now in {self._folder}, the file is no longer needed")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the file system into one line: where, what, and what to do."""
        try:
            with self._lock:
                yield
        except OSError as err:
            if err.errno is None:
                raise  # it is one already
            if err.errno in FULL:
                what, advice = "the disk is full", "free some space and run again, what was stored stays"
            else:
                what = f"cannot be read or written ({err.strerror})"
                advice = "set label.store to a place that can, or change its permissions"
            raise OSError(f"{err.filename or self.name}: {what}; {advice}") from err


def _places(path: str) -> tuple[Path, Path]:
    """Return the folder of a store, and the file that earlier versions may have left.

    Raises:
        ValueError: the path is a URL, or in the home of nobody.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path) or os.path.expanduser(path).startswith("~"):
        raise ValueError(
            f"label.store: found {path}, expected a folder; mount it and name that, or keep a local one and"
            " share it through a DVC remote"
        )
    place = Path(path).expanduser()
    if place.suffix == ".sqlite" or (place.suffix and os.path.isfile(place)):
        return place.with_suffix(""), place
    if os.path.isfile(place):
        return place.with_name(f"{place.name}.d"), place
    return place, place.with_name(f"{place.name}.sqlite")


def _share(file: int) -> None:
    with contextlib.suppress(OSError):  # a file system without modes
        os.fchmod(file, 0o664)  # whatever the umask: the whole team compacts here


def _head(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def _id(recipe: Recipe) -> str:
    return recipe.digest.hex()[:12]


def _summary(line: bytes, answers: int = 0, tokens: int = 0) -> Summary:
    used_at, teacher, identity, sampling = json.loads(line[BODY])
    name = line[KEY][:12].decode()
    return Summary(name, teacher, json.loads(identity), json.loads(sampling), answers, tokens, used_at)


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

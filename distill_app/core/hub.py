"""Which repositories of the Hub the params name, and the commits that their branches and tags are now."""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill_app.core.files import save_text
from distill_app.core.models import is_local_path
from distill_app.core.params import Section, SectionType
from distill_app.core.stage import one_line

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
OWNERS = ("dataset", "teacher", "student")  # what a bare `revision` pins, of what stands beside it
TIMEOUT_SEC = 10.0
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class HubInput:
    """A repository that a param names, and the param that pins it."""

    keys: tuple[str | int, ...]  # the way to the param in params.yaml, such as ("label", "teacher")
    revision_keys: tuple[str | int, ...]
    repo: str
    kind: Kind
    revision: str | None

    @property
    def name(self) -> str:
        """Return the param's name, such as label.teacher."""
        return ".".join(map(str, self.keys))

    @property
    def branch(self) -> str:
        """Return the branch or tag that is followed: of a pinned input the main one."""
        return "main" if self.is_pinned or self.revision is None else self.revision

    @property
    def is_pinned(self) -> bool:
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def hub_inputs(name: str, section: Section) -> list[HubInput]:
    """Return the Hub's repositories that a section names, by the params that can pin them.

    `revision` pins the dataset, teacher or student beside it, `X_revision` the X beside it.
    """
    values = {key: value for key, value in section.model_dump().items() if key not in section.hosted()}
    return list(_inputs_in(values, (name,)))


def _inputs_in(value: Any, at: tuple[str | int, ...]) -> Iterator[HubInput]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inputs_in(item, (*at, key))
            if str(key) == "revision" or str(key).endswith("_revision"):
                yield from _pinned_by(key, value, at)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            yield from _inputs_in(item, (*at, number))


def _pinned_by(key: str, beside: Mapping[str, Any], at: tuple[str | int, ...]) -> Iterator[HubInput]:
    owners = OWNERS if key == "revision" else (key.removesuffix("_revision"),)
    for owner in owners:
        repo = beside.get(owner)
        if isinstance(repo, str) and REPO_ID.fullmatch(repo) and not is_local_path(repo):
            kind: Kind = "dataset" if owner == "dataset" else "model"
            yield HubInput((*at, owner), (*at, key), repo, kind, beside[key])


def read_at_commits(stage: str, name: str, section: SectionType) -> SectionType:
    """Return the section with the commit of now for every Hub input that is not pinned, told on stderr.

    So all that a run reads of a branch is of one commit. Where the commit cannot be found out, the param
    stays as it is and whatever reads the repository tells why.
    """
    values = section.model_dump()
    for item in hub_inputs(name, section):
        if item.is_pinned:
            continue
        try:
            commit, before = find_commit(item.repo, item.revision, item.kind)
        except OSError as err:
            print(f"{stage}: {item.name}: not pinned: {one_line(err)}", file=sys.stderr, flush=True)
            continue
        set_at(values, item.revision_keys[1:], commit)
        moved = f", which was {before} before" if before not in (None, commit) else ""
        print(
            f"{stage}: {item.name}: {item.repo} is not pinned; this run reads {item.branch} at"
            f" {commit}{moved} (distill pin {item.name} pins it)",
            file=sys.stderr,
            flush=True,
        )
    return type(section).model_validate(values)


def commits(name: str, section: Section) -> dict[str, dict[str, str]]:
    """Return, for a stage's metrics, what it read of the Hub: `{"commits": {param: repository@commit}}`.

    Without such inputs, or where no commit is known, nothing.
    """
    pinned = [item for item in hub_inputs(name, section) if item.is_pinned]
    return {"commits": {item.name: f"{item.repo}@{item.revision}" for item in pinned}} if pinned else {}


def set_at(values: Any, keys: Sequence[str | int], value: str) -> None:
    """Set a value in nested mappings and lists."""
    *way, last = keys
    for key in way:
        values = values[key]
    values[last] = value


def find_commit(repo: str, revision: str | None, kind: Kind) -> tuple[str, str | None]:
    """Return the commit that a branch or tag is, and the one that the local cache had for it, if any.

    Where the Hub is not reached, both are the cache's.

    Raises:
        FileNotFoundError, OSError: as `ask_commit` does; the cache does not know it either.
    """
    ref = _ref(repo, revision, kind)
    cached = ref.read_text(encoding="utf-8").strip() if ref.is_file() else None
    try:
        commit = ask_commit(repo, revision, kind)
    except FileNotFoundError:
        raise
    except OSError:
        if cached is None:
            raise
        return cached, cached
    if commit != cached:  # the cache by itself keeps only what was read by the branch's name
        with contextlib.suppress(OSError):  # one that others own
            save_text(ref, commit)
    return commit, cached


def ask_commit(repo: str, revision: str | None, kind: Kind) -> str:
    """Return the commit that a branch (the main one by default) or tag is on the Hub.

    Raises:
        FileNotFoundError: the Hub has no such repository or revision, or hides it.
        OSError: the Hub is not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT_SEC)
    except RevisionNotFoundError as err:
        raise FileNotFoundError(f"{repo}: the Hub has no revision {revision} of it; fix revision") from err
    except RepositoryNotFoundError as err:  # gated ones among them
        raise FileNotFoundError(
            f"{repo}: the Hub shows no such {kind}, or it is gated or private; check the id, or ask for"
            " access and set HF_TOKEN"
        ) from err
    except Exception as err:  # offline mode, httpx and its timeouts, an id that is none
        raise OSError(
            f"{repo}: its commit is not known ({one_line(err)}); check the network (HF_HUB_OFFLINE, proxy)"
        ) from err
    if not found.sha:
        raise OSError(f"{repo}: the Hub names no commit of {revision or 'main'}; try again")
    return found.sha


def _ref(repo: str, revision: str | None, kind: Kind) -> Path:
    """Return where the Hub's cache keeps the commit of a branch or tag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo, repo_type=kind)
    return Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")

"""What a checkpoint is made from: its parents with their licences, its data, digests of both."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_app.core.models import is_local_path

LICENSE_KEYS = ("license", "license_name", "license_link")  # of a card's front matter
COMMIT = re.compile(r"[0-9a-f]{40}")
LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


def made_from(
    student: str,
    teacher: str | None,
    data_path: str,
    source: str | None = None,
    student_revision: str | None = None,
    teacher_revision: str | None = None,
) -> dict[str, Any]:
    """Return a training's parents and data, without times, hosts or absolute paths.

    Args:
        source: the dataset that the records of `data_path` were taken from, where it is known.
        student_revision: of a Hub student, its commit.
        teacher_revision: of a Hub teacher, as the config names it; `with_licences` says which commit that is.
    """
    parent = parent_of(student) | ({"commit": student_revision} if student_revision else {})
    named = {"revision": teacher_revision} if teacher_revision else {}
    return {
        "student": parent,
        "teacher": None if teacher is None else _teacher(teacher, parent) | named,
        "data": {"path": unplaced(data_path), "sha256": file_digest(data_path)},
        "source": None if source is None else unplaced(source),
    }


def parent_of(model: str) -> dict[str, Any]:
    """Return a model's name and digest, and what its own folder says of its origin and licence.

    The keys `model` and `sha256` (None for the Hub's) are always there; `base_model` (a Hub id, or several),
    `license`, `license_name`, `license_link` and `made_from` only where they are known. Of a Hub model
    `with_licences` asks.
    """
    if not is_local_path(model):
        return {"model": model, "sha256": None, "base_model": model}
    folder = Path(model)
    card = front_matter(folder / "README.md")
    known = {key: card[key] for key in ("base_model", *LICENSE_KEYS, "made_from") if card.get(key)}
    if "license" not in known:
        known |= _license_file(folder)
    return {"model": model, "sha256": model_digest(model), **known}


def _teacher(teacher: str, student: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the teacher without reading its weights: it need not be on this machine.

    A student that was cut from it brings its parent's name, digest and licence along.
    """
    parent = student.get("made_from")
    if isinstance(parent, Mapping) and parent.get("model") == teacher:
        shared = {key: student[key] for key in ("base_model", *LICENSE_KEYS) if key in student}
        return {"model": teacher, "sha256": parent.get("sha256"), **shared}
    return {"model": unplaced(teacher), "sha256": None}


def front_matter(path: Path) -> dict[str, Any]:
    """Return a card's metadata; nothing where there is no card, or none that can be read."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _license_file(folder: Path) -> dict[str, str]:
    """Return the front matter of a folder whose licence is a file alone: the Hub calls such "other"."""
    for path in sorted(p for pattern in LICENSE_FILES[:2] for p in folder.glob(pattern)):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        title = next((line.strip() for line in lines if line.strip()), path.name)
        name = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")
        return {"license": "other", "license_name": name or "unnamed", "license_link": path.name}
    return {}


def with_licences(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return an origin with `commit` and licence of those parents that are the Hub's, where they are known.

    A card is read from this machine's cache, or else from the Hub. This stands apart from `made_from`: what
    the network answers must not tell one training from another.
    """
    return {**origin, **{role: _with_licence(origin.get(role)) for role in ("student", "teacher")}}


def _with_licence(parent: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    # A name without an owner is an endpoint's
    if parent is None or parent["sha256"] or "/" not in parent["model"] or is_local_path(parent["model"]):
        return parent
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    model, commit, card = parent["model"], parent.get("commit"), {}
    revision = commit or parent.get("revision")
    if revision and COMMIT.fullmatch(revision):
        commit = revision
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
        commit = Path(config).parent.name if isinstance(config, str) else commit
        card = front_matter(Path(hf_hub_download(model, "README.md", revision=commit or revision)))
    except (OSError, ValueError) as error:  # no network, no such model, a name that is not a Hub id's
        print(f"{model}: its licence is not known, its card cannot be read ({type(error).__name__})")
    known = {key: card[key] for key in LICENSE_KEYS if card.get(key)}
    return {**parent, **({"commit": commit} if commit else {}), **known}


def copy_license(parent: str, folder: str | Path) -> None:
    """Copy a parent's licence and notices, which many licences want passed on, into a new checkpoint."""
    for pattern in LICENSE_FILES:
        for path in Path(parent).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, Path(folder) / path.name)


def unplaced(path: str) -> str:
    """Return a relative path as it is, of an absolute one the name alone."""
    return Path(path).name if Path(path).is_absolute() else path


def model_digest(model: str) -> str | None:
    """Return the SHA-256 over a local checkpoint's weights, config and tokenizer; None for the Hub's."""
    parts = ("*.safetensors", "config.json", "tokenizer*")
    files = sorted(path for part in parts for path in Path(model).glob(part))
    return digest_of(files) if files else None


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over the SHA-256 of each file."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()

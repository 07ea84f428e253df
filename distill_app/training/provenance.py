"""What produced a checkpoint: parents, params, data, versions; the same for identical runs."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from distill_app.training.config import Job


def provenance(job: Job, counts: dict[str, int]) -> dict[str, Any]:
    """Return the origin of a checkpoint, without times, hosts or absolute paths."""
    packages = ("torch", "transformers", "trl")
    return {
        "backend": "builtin",
        "job_type": job.job_type,
        "student": {"model": job.models["student"], "sha256": model_digest(job.models["student"])},
        "data": {"path": job.dataset["labeled_path"], **_digest_of(job.dataset["labeled_path"])},
        "examples": counts,
        "training": {k: v for k, v in job.training.items() if k != "output_dir"},
        "seed": job.dataset.get("seed"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def model_digest(model: str) -> str | None:
    """Return the SHA-256 over a local checkpoint's weight files; None for a model of the Hub."""
    weights = sorted(Path(model).glob("*.safetensors"))
    if not weights:
        return None
    digest = hashlib.sha256()
    for path in weights:
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(path: str) -> dict[str, str]:
    return {"sha256": file_digest(path)} if Path(path).is_file() else {}

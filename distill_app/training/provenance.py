"""What produced a checkpoint: parents, params, data, code and versions; the same for identical runs."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_app.core.logits import TopLogits
from distill_app.training.config import Job

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")


def origin_of(job: Job, logits: TopLogits | None, world_size: int) -> dict[str, Any]:
    """Return what a training is made from, without times, hosts or absolute paths."""
    data, template = job.dataset.labeled_path, job.dataset.template
    return {
        "backend": "builtin",
        "job_type": job.job_type,
        "student": {"model": job.models.student, "sha256": model_digest(job.models.student)},
        "quantization": job.models.quantization,
        "teacher": job.models.teacher,
        "data": {"path": _unplaced(data), "sha256": file_digest(data)},
        "template_sha256": file_digest(template) if template else None,
        "probabilities": _probabilities(job, logits),
        "training": {k: v for k, v in job.training.items() if k != "output_dir"},
        "lora": job.lora,
        "validation": job.validation.model_dump(),
        "too_long": job.dataset.too_long,
        "seed": job.dataset.seed,
        "processes": world_size,
        "trainer_sha256": _code_digest(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _probabilities(job: Job, logits: TopLogits | None) -> dict[str, Any] | None:
    if logits is None or job.dataset.logits_path is None:
        return None
    return {
        "path": _unplaced(job.dataset.logits_path),
        "sha256": file_digest(job.dataset.logits_path),
        "teacher": logits.teacher,
        "top": logits.top,
        **job.distillation.model_dump(),
    }


def _unplaced(path: str) -> str:
    """Return a relative path as it is, of an absolute one the name alone."""
    return Path(path).name if Path(path).is_absolute() else path


def model_digest(model: str) -> str | None:
    """Return the SHA-256 over a local checkpoint's weights, config and tokenizer; None for the Hub's."""
    parts = ("*.safetensors", "config.json", "tokenizer*")
    files = sorted(path for part in parts for path in Path(model).glob(part))
    return _digest(files) if files else None


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_digest() -> str:
    return _digest(sorted(Path(__file__).parent.glob("*.py")))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()

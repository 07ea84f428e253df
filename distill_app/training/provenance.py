"""What produced a checkpoint: parents, params, data, code and versions; the same for identical runs."""

import importlib.metadata
from pathlib import Path
from typing import Any

from distill_app.core.logits import TopLogits
from distill_app.easydistill.job import Job
from distill_app.report.cards.origin import digest_of, file_digest, made_from, unplaced

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")


def origin_of(job: Job, logits: TopLogits | None, world_size: int) -> dict[str, Any]:
    """Return what a training is made from, without times, hosts or absolute paths."""
    template = job.dataset.template
    return {
        "backend": "builtin",
        "job_type": job.job_type,
        **made_from(
            job.models.student,
            job.models.teacher,
            job.dataset.labeled_path,
            job.source,
            job.models.student_revision,
            job.models.teacher_revision,
        ),
        "quantization": job.models.quantization,
        "template_sha256": file_digest(template) if template else None,
        "probabilities": _probabilities(job, logits),
        "training": {k: v for k, v in job.training.items() if k != "output_dir"},
        "lora": job.lora,
        "validation": job.validation.model_dump(),
        "batching": job.batching.model_dump(),
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
        "path": unplaced(job.dataset.logits_path),
        "sha256": file_digest(job.dataset.logits_path),
        "teacher": unplaced(logits.teacher),
        "top": logits.top,
        **job.distillation.model_dump(),
    }


def _code_digest() -> str:
    return digest_of(sorted(Path(__file__).parent.glob("*.py")))

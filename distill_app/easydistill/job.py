"""EasyDistill 1.0's JSON config, read once for labelling, training and the launcher.

Beside EasyDistill's own keys it knows these, which EasyDistill ignores:

| key | meaning |
|---|---|
| `dataset.too_long` | "drop" (default) or "cut" examples over `training.max_length` tokens |
| `models.student_revision`, `models.teacher_revision` | of a Hub model: commit, tag or branch |
| `models.quantization` | "8bit" or "4bit" (bitsandbytes), of a student under LoRA |
| `inference.engine`, `inference.top_p` | "transformers" or "vllm"; nucleus sampling |
| `distillation.temperature` | of both distributions |
| `validation.fraction` | of the training data, held out to choose the best checkpoint by; 0 for none |
| `validation.patience` | evaluations without a better loss after which training stops; null for never |
| `batching.tokens_per_step` | tokens a step, about, on all devices together, in place of examples |
| `batching.tokens_at_a_time` | that go through the model at once; null for what memory holds |
| `lora` | fields of PEFT's LoraConfig; trains adapters and merges them at the end |
| `source` | the dataset that the records come from, which the model card names |
| `accelerate` | "ddp", "fsdp" or an accelerate config file, to launch with |
| `backend` | "builtin" or "easydistill" |

The fields of `training` are TRL's SFTConfig's; `distill_app.training.config` checks them.
"""

import os
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict, Field

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import Record, as_record, iter_items, read_json
from distill_app.core.models import Quantization, hub_commit
from distill_app.core.params import Section, check_section, unknown_key

Divergence = Literal["forward_kld", "reverse_kld"]


class Dataset(Section):
    """The `dataset` section; paths are relative to the current folder."""

    labeled_path: str = Field(min_length=1)
    instruction_path: str | None = None
    logits_path: str | None = None
    template: str | None = None
    seed: int = 42
    too_long: Literal["drop", "cut"] = "drop"


class Models(Section):
    """The `models` section: Hub ids or folders; an API job's teacher is the server's name for its model."""

    student: str = Field(min_length=1)
    student_revision: str | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    quantization: Quantization = "none"


class Inference(Section):
    """What every labelling job's `inference` knows; the defaults are those of EasyDistill's example."""

    temperature: float = Field(0.8, ge=0)
    seed: int = 777
    max_new_tokens: int = Field(512, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)


class LocalInference(Inference):
    """`inference` of kd_black_box_local."""

    engine: Literal["transformers", "vllm"] = "transformers"
    max_model_len: int | None = Field(None, ge=1)
    enable_chunked_prefill: bool | None = None
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    enforce_eager: bool | None = None
    trust_remote_code: bool = False


class WhiteBoxInference(LocalInference):
    """`inference` of kd_white_box."""

    top_logits_num: int = Field(10, ge=1, le=1024)


class ApiInference(Inference):
    """`inference` of kd_black_box_api."""

    base_url: str
    api_key: str = Field("", repr=False)
    stream: bool = False
    system_prompt: str = ""


class Distillation(Section):
    """The `distillation` section of white-box jobs; see `training.losses.Objective`."""

    kd_ratio: float = Field(0.5, ge=0, le=1)
    distillation_type: Divergence = "forward_kld"
    temperature: float = Field(1.0, gt=0)
    max_seq_length: int | None = None


class Validation(Section):
    """The `validation` section."""

    fraction: float = Field(0.0, ge=0, lt=1)
    patience: int | None = Field(None, ge=1)


class Batching(Section):
    """The `batching` section: how many tokens, where it is not examples that are counted."""

    tokens_per_step: int | None = Field(None, ge=1)
    tokens_at_a_time: int | None = Field(None, ge=1)


class Job(Section):
    """A config; `path` is its file's. A top-level key that is unknown is EasyDistill's or nobody's."""

    model_config = ConfigDict(extra="ignore")

    path: str
    job_type: str
    dataset: Dataset
    models: Models
    training: dict[str, Any]
    distillation: Distillation = Distillation.model_validate({})
    validation: Validation = Validation.model_validate({})
    batching: Batching = Batching.model_validate({})
    lora: dict[str, Any] | None = None
    source: str | None = None
    accelerate: str | None = None
    backend: Literal["builtin", "easydistill"] | None = None

    @property
    def output_dir(self) -> str:
        """Where the finished checkpoint goes."""
        return str(self.training["output_dir"])

    @property
    def is_white_box(self) -> bool:
        """Whether the student learns from the teacher's probabilities too."""
        return self.job_type.startswith("kd_white_box")


class LabelingJob(Job):
    """A job that labels before it trains."""

    inference: Inference


class LocalJob(LabelingJob):
    """A teacher with weights here."""

    inference: LocalInference = LocalInference.model_validate({})


class WhiteBoxJob(LocalJob):
    """A teacher with weights here, whose probabilities are learned too."""

    inference: WhiteBoxInference = WhiteBoxInference.model_validate({})


class ApiJob(LabelingJob):
    """A teacher behind an OpenAI-compatible server."""

    inference: ApiInference


JOBS: dict[str, type[Job]] = {
    "kd_black_box_local": LocalJob,
    "kd_black_box_api": ApiJob,
    "kd_black_box_train_only": Job,
    "kd_white_box": WhiteBoxJob,
    "kd_white_box_train_only": Job,
}
LABELING_JOBS = [name for name, model in JOBS.items() if issubclass(model, LabelingJob)]
TOP_LEVEL = {key for model in JOBS.values() for key in model.model_fields} - {"path"}


def read_job(
    path: str | os.PathLike[str], labeled_path: str | None = None, logits_path: str | None = None
) -> Job:
    """Return the config of its job type, with other data than it names if that is given.

    Raises:
        FileNotFoundError, ValueError: the file is missing or malformed, or a key is missing, unknown, of
            no use to this type of job or of a value that has no meaning; the key is named, a secret is not.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: found {type(config).__name__}, expected an object")
    job_type = config.get("job_type")
    if not isinstance(job_type, str) or job_type not in JOBS:
        raise ValueError(f"{path}: job_type: found {job_type!r}, expected one of {', '.join(JOBS)}")
    _refuse_misplaced(path, job_type, config)
    config = {key: value for key, value in config.items() if value is not None} | {"path": str(path)}
    given = {"labeled_path": labeled_path, "logits_path": logits_path}
    if isinstance(config.get("dataset", {}), dict):
        config["dataset"] = config.get("dataset", {}) | {k: v for k, v in given.items() if v}
    for section in ("models", "training"):
        config.setdefault(section, {})
    job = check_section(config, "", JOBS[job_type], path)
    if not job.training.get("output_dir"):
        raise ValueError(f"{path}: training.output_dir: missing; add it")
    _refuse_short_context(job)
    return job


def at_commit(job: Job) -> Job:
    """Return the job with its Hub student's branch or tag as the commit that it is now.

    Raises:
        OSError: it is not known.
    """
    commit = hub_commit(job.models.student, job.models.student_revision)
    models = job.models.model_copy(update={"student_revision": commit})
    return job.model_copy(update={"models": models})


def _refuse_misplaced(path: Any, job_type: str, config: dict[str, Any]) -> None:
    """Raise ValueError for a top-level key that is nearly one, and for a key of another job's inference.

    EasyDistill ignores a top-level key that it does not know.
    """
    if "peft" in config:
        raise ValueError(f"{path}: peft: unknown key; did you mean lora?")
    for key in config:
        if key not in TOP_LEVEL and "did you mean" in (told := unknown_key(key, TOP_LEVEL)):
            raise ValueError(f"{path}: {key}: {told}")
    sections = {name: _inference_keys(name) for name in LABELING_JOBS}
    inference = config.get("inference")
    if job_type not in sections or not isinstance(inference, dict):
        return
    for key in inference:
        homes = [name for name, keys in sections.items() if key in keys]
        if homes and job_type not in homes:
            raise ValueError(
                f"{path}: inference.{key}: found in a job that has no use for it, expected in"
                f" {' or '.join(homes)}; remove it"
            )


def _inference_keys(job_type: str) -> set[str]:
    section = JOBS[job_type].model_fields["inference"].annotation
    assert section is not None
    return set(section.model_fields)


def _refuse_short_context(job: Job) -> None:
    keys = job.inference if isinstance(job, LocalJob) else None
    if keys and keys.max_model_len is not None and keys.max_model_len <= keys.max_new_tokens:
        raise ValueError(
            f"{job.path}: inference.max_model_len: found {keys.max_model_len}, expected more than"
            f" inference.max_new_tokens ({keys.max_new_tokens}), or no prompt fits"
        )


def read_labeled(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records of `dataset.labeled_path` as `iter_labeled` reads them, with its errors."""
    return list(iter_labeled(path))


def iter_labeled(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records of `dataset.labeled_path`; EasyDistill's own files have no `input`.

    Raises:
        EmptyDataError, FileNotFoundError, ValueError: as `core.files.iter_records`.
    """
    number = -1
    for number, item in enumerate(iter_items(path)):
        yield as_record(path, number, item, optional=("input",))
    if number < 0:
        raise EmptyDataError(f"{path}: the list is empty, expected labelled records; label first")

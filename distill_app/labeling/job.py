"""EasyDistill 1.0 jobs that label: what lacks an answer is asked of the teacher, what has one is copied.

What the keys do here; `training`, `distillation`, `models.student`, `models.quantization` and of `dataset`
the `template`, `seed` and `too_long` are the trainer's. The teacher is asked in its own chat template. Keys
of `inference` stand without their section, the last four are for kd_black_box_api, those from `engine` to
`top_logits_num` for the two other jobs.

| key | here |
|---|---|
| `dataset.labeled_path` | records that are labelled already; read where the file exists, never written |
| `dataset.instruction_path` | instructions, of which those that `labeled_path` lacks are asked |
| `dataset.logits_path` | no effect: ours go to `--logits-out`, in another format |
| `models.teacher` | Hub id or checkpoint folder; of an API job the server's name, else its first model |
| `temperature`, `seed`, `top_p`, `max_new_tokens` | as they say, unlike in EasyDistill; `top_p` is ours |
| `engine` | ours: "transformers" in this process, or "vllm" |
| `max_model_len` | a prompt without room for `max_new_tokens` in it is not asked; vLLM's context |
| `enable_chunked_prefill` | to vLLM; no meaning and no effect in process |
| `gpu_memory_utilization` | to vLLM; no meaning and no effect in process |
| `enforce_eager` | to vLLM; no meaning and no effect in process |
| `trust_remote_code` | to vLLM; not made use of in process, where a teacher that needs it is an error |
| `top_logits_num` | log-probabilities a token, for kd_white_box alone |
| `base_url` | the server |
| `api_key` | its key; a placeholder such as "TOKEN" leaves it to OPENAI_API_KEY |
| `system_prompt` | a message before the user's |
| `stream` | no effect: in parts or whole, the answer is the same |

A key that the type of job has no use for, or that nobody knows, is an error.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from distill_app.core.errors import EmptyDataError, EngineGone
from distill_app.core.files import RECORD_FIELDS, Record, as_record, iter_items, save_records
from distill_app.core.models import load_tokenizer
from distill_app.core.stage import one_line
from distill_app.easydistill.job import LABELING_JOBS, ApiJob, LabelingJob, LocalJob, WhiteBoxJob, read_job
from distill_app.generation.answers import Engine, Sampling
from distill_app.generation.engines import open_engine
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.label import select_answers
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore

STORE_PATH = "work/answers"
LOG_PATH = "work/label.log"
BATCH_SIZE = 128  # the engines take fewer at a time where memory runs out
CONCURRENCY = 16
VLLM_KEYS = {
    "max_model_len",
    "enable_chunked_prefill",
    "gpu_memory_utilization",
    "enforce_eager",
    "trust_remote_code",
}
# EasyDistill's own example says TOKEN
PLACEHOLDER = re.compile(r"|token|empty|none|null|your[ _-].*|[<{$].*|(sk-)?[x.*]+", re.IGNORECASE)
TOO_LONG = "too long for max_model_len"
PROMPT_FIELDS = ("instruction", "input")


def label_job(config_path: str, out_path: str, logits_out_path: str | None = None) -> str:
    """Write the labelled records of a job, old and new, and say in one line how many.

    Old are those of `dataset.labeled_path`, new are the instructions that it lacks, with the teacher's
    answers; an answer cut at the limit, an empty and a refused one are left out and counted. Of the
    config's own files none is written. All records are held in memory, as in EasyDistill.

    Args:
        out_path: a JSON list, or JSON lines or Parquet where the name ends so.
        logits_out_path: gets the teacher's likeliest tokens for each written record; for `kd_white_box`.

    Raises:
        EmptyDataError: there is nothing to train on; no file is written.
        EngineGone: the teacher is gone for good; run again, what was answered is not asked twice.
        FileNotFoundError: neither of the two files is there.
        ValueError, OSError: the config, a file or the teacher is at fault; one line.
    """
    job = read_label_job(config_path)
    _check_targets(job, out_path, logits_out_path)
    labeled, lacking = _records(job)
    with _in_the_configs_words(job):
        _check_top_logits(job)  # before any answer is paid for
        new, dropped = _label(job, lacking) if lacking else ([], {})
    told = _told(labeled, new, dropped)
    if not labeled and not new:
        raise EmptyDataError(f"{config_path}: nothing to train on: {told}; see to its data or inference keys")
    save_records(out_path, [*labeled, *new])
    if logits_out_path is not None:
        _write_top_logits(job, out_path, logits_out_path)
    return f"label_job: {told}, all in {out_path}"


def read_label_job(path: str) -> LabelingJob:
    """Return the config as a labelling job.

    Raises:
        FileNotFoundError, ValueError: as `read_job`, or the job does not label, or names no teacher to load.
    """
    job = read_job(path)
    if not isinstance(job, LabelingJob):
        labels = ", ".join(LABELING_JOBS)
        raise ValueError(f"{path}: job_type: found {job.job_type!r}, expected one that labels: {labels}")
    if not job.models.teacher and not isinstance(job, ApiJob):
        raise ValueError(f"{path}: models.teacher: missing; add it")
    return job


def _check_targets(job: LabelingJob, out_path: str, logits_out_path: str | None) -> None:
    """Make sure that nothing of the config's is overwritten, and that what it asks for has a place."""
    own = {Path(p).resolve() for p in (job.path, job.dataset.labeled_path, job.dataset.instruction_path) if p}
    for path in filter(None, (out_path, logits_out_path)):
        if Path(path).resolve() in own:
            raise ValueError(f"{path}: a file that {job.path} reads or writes, expected another; name one")
        own.add(Path(path).resolve())
    if _top_logits(job) and logits_out_path is None:
        raise ValueError(f"{job.path}: job_type kd_white_box writes log-probabilities; add --logits-out PATH")
    if logits_out_path is not None and not _top_logits(job):
        raise ValueError(f"--logits-out: {job.path} is no kd_white_box, which alone has them; leave it out")


def _records(job: LabelingJob) -> tuple[list[Record], list[Record]]:
    """Return the labelled records, and the instructions without one, in their files' order."""
    sources = job.dataset.labeled_path, job.dataset.instruction_path
    labeled = _read_items(sources[0], RECORD_FIELDS)
    asked = _read_items(sources[1], PROMPT_FIELDS) if sources[1] else None
    if labeled is None and asked is None:
        named = f" nor {sources[1]} (dataset.instruction_path)" if sources[1] else ""
        raise FileNotFoundError(
            f"{job.path}: found no file at {sources[0]} (dataset.labeled_path){named}; fix the paths"
        )
    there = {_words(record) for record in labeled or ()}
    return labeled or [], [record for record in asked or () if _words(record) not in there]


def _read_items(path: str, fields: tuple[str, ...]) -> list[Record] | None:
    """Return the records of a file with these fields alone; None where there is no file."""
    if not Path(path).exists():
        return None
    # EasyDistill's own files have no input
    return [as_record(path, n, item, fields, optional=("input",)) for n, item in enumerate(iter_items(path))]


def _words(record: Record) -> tuple[str, str]:
    """Return what a prompt is made of: records that are alike in it are one instruction."""
    return record["instruction"].strip(), record["input"].strip()


def _label(job: LabelingJob, items: Sequence[Record]) -> tuple[list[Record], dict[str, int]]:
    """Return the records that got a whole answer, and how many got none, by reason."""
    with closing(_open(job)) as engine, AnswerStore(STORE_PATH) as store:
        fitting = _fitting(job, engine, items)

        def prompts() -> Iterator[str]:
            return (_rendered(engine, item) for item in fitting)

        fill_store(
            engine, prompts, _sampling(job), store, total=len(fitting), label="label", log_path=LOG_PATH
        )
        answers = list(read_answers(engine, prompts(), _sampling(job), store))
    kept, counts = select_answers(fitting, answers, "drop")
    return kept, {**counts["dropped"], TOO_LONG: len(items) - len(fitting)}


def _open(job: LabelingJob) -> Engine:
    if isinstance(job, ApiJob):
        return _open_endpoint(job)
    return open_engine(_params(job), job.inference.model_dump(include=VLLM_KEYS, exclude_none=True))


def _open_endpoint(job: ApiJob) -> Engine:
    from distill_app.generation.endpoint import Endpoint

    keys = job.inference
    key = "" if PLACEHOLDER.fullmatch(keys.api_key.strip()) else keys.api_key
    options: dict[str, Any] = {
        "revision": job.models.teacher_revision,
        "system_prompt": keys.system_prompt,
        "api_key": key,
    }
    engine = Endpoint(job.models.teacher or "", keys.base_url, CONCURRENCY, **options)
    if job.models.teacher:
        return engine
    return Endpoint(_served_model(keys.base_url, key), keys.base_url, CONCURRENCY, **options)


def _served_model(base_url: str, key: str) -> str:
    """Return the first model that a server lists: EasyDistill's own example of an API job names none.

    Raises:
        EngineGone: the server lists none, in words that hold no key.
    """
    from openai import APIStatusError, OpenAI, OpenAIError

    try:
        client = OpenAI(api_key=key or os.environ.get("OPENAI_API_KEY") or "none", base_url=base_url)
        names = [model.id for model in client.models.list().data]
    except OpenAIError as err:
        said = f"status {err.status_code}" if isinstance(err, APIStatusError) else type(err).__name__
        names = []
    else:
        said = "an empty list"
    if not names:
        shown = base_url.rpartition("@")[2]  # without credentials
        raise EngineGone(f"{shown}: the server names no model ({said}); add models.teacher")
    return names[0]


def _fitting(job: LabelingJob, engine: Engine, items: Sequence[Record]) -> Sequence[Record]:
    """Return the items whose prompt leaves room for a whole answer.

    The engines are not left to refuse the others: the store keeps a refusal, and its key knows no
    `max_model_len`.
    """
    limit = job.inference.max_model_len if isinstance(job, LocalJob) else None
    if limit is None:
        return items
    tokenizer = load_tokenizer(_teacher(job), job.models.teacher_revision)
    longest = limit - job.inference.max_new_tokens

    def tokens(item: Record) -> int:
        return len(tokenizer(_rendered(engine, item), add_special_tokens=False)["input_ids"])

    return [item for item in items if tokens(item) <= longest]


def _rendered(engine: Engine, item: Record) -> str:
    return engine.render(item["instruction"], item["input"], "system1")


def _teacher(job: LabelingJob) -> str:
    assert job.models.teacher is not None  # read_label_job has seen to it
    return job.models.teacher


def _top_logits(job: LabelingJob) -> int:
    """Return how many log-probabilities a token are wanted; 0 for none."""
    return job.inference.top_logits_num if isinstance(job, WhiteBoxJob) else 0


def _sampling(job: LabelingJob) -> Sampling:
    """Return how the teacher's tokens are chosen."""
    keys = job.inference
    return Sampling(keys.max_new_tokens, keys.temperature, keys.top_p, keys.seed)


def _params(job: LabelingJob) -> LabelParams:
    """Return the job of a teacher with weights as the label stage would be told it."""
    assert isinstance(job, LocalJob)
    engine = job.inference.engine
    return LabelParams.model_validate(
        {
            **job.inference.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}),
            "teacher": _teacher(job),
            "revision": job.models.teacher_revision,
            "quantization": "none",  # as in EasyDistill
            "engine": engine,
            "base_url": None,
            "system_prompt": None,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "generation_config": False,
            "stop": [],
            "samples": 1,
            "choose": "majority",
            "judge": None,
            "judge_revision": None,
            "judge_engine": None,
            "judge_base_url": None,
            "judge_max_new_tokens": job.inference.max_new_tokens,
            "engine_workers": 1,
            "gpus_per_worker": _gpu_count() if engine == "vllm" else 1,
            "ray_address": None,
            "concurrency": CONCURRENCY,
            "batch_api": False,
            "requests_per_minute": None,
            "tokens_per_minute": None,
            "max_cost": None,
            "price_in": 0.0,
            "price_out": 0.0,
            "batch_size": BATCH_SIZE,
            "on_truncated": "drop",
            "retry_max_new_tokens": job.inference.max_new_tokens,
            "top_logits": _top_logits(job),
            "store": STORE_PATH,
        }
    )


def _gpu_count() -> int:
    """Return over how many GPUs a teacher is spread: all, as in EasyDistill."""
    import torch

    return max(torch.cuda.device_count(), 1)


def _check_top_logits(job: LabelingJob) -> None:
    if _top_logits(job):
        from distill_app.labeling.logits import check_top_logits  # vLLM's environment may lack its pyarrow

        check_top_logits(_params(job))


def _write_top_logits(job: LabelingJob, labeled_path: str, logits_path: str) -> None:
    from distill_app.labeling.logits import write_top_logits

    with _in_the_configs_words(job):
        write_top_logits(_params(job), labeled_path, logits_path, LOG_PATH)


@contextmanager
def _in_the_configs_words(job: LabelingJob) -> Iterator[None]:
    """Name the config and its keys in errors of what speaks of the stage's params."""
    try:
        yield
    except (ValueError, ImportError) as err:
        text = one_line(err).replace("label.top_logits", "inference.top_logits_num")
        text = text.replace("label.engine", "inference.engine")
        if "trust_remote_code" in text:  # transformers' words for a model with code of its own
            text = (
                f"{job.models.teacher}: needs code of its own, which is not run in process; take"
                " inference.engine vllm, or a server and kd_black_box_api"
            )
        raise ValueError(f"{job.path}: {text}") from err


def _told(labeled: Sequence[Record], new: Sequence[Record], dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    left_out = f"{sum(dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
    return f"{len(labeled)} records were there, {len(new)} labelled now, {left_out}"

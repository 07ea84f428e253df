"""One training, from config to checkpoint."""

import shutil
import sys
import tempfile
import warnings
from typing import Any

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import new_folder, read_records, save_json, save_text
from distill_app.core.models import load_trainable, save_checkpoint
from distill_app.training.config import Job, read_job, sft_arguments
from distill_app.training.examples import build_examples, read_template
from distill_app.training.provenance import provenance

LOSS_FILE = "loss.csv"


def train_student(config_path: str) -> str:
    """Train as an EasyDistill config says; return the folder of the finished checkpoint.

    The folder appears at once when all is done: weights, tokenizer, chat template, `loss.csv`
    (step, loss) and `provenance.json`.

    Raises:
        ValueError, FileNotFoundError: in config, data or model; one line.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that TRL still uses
    job = read_job(config_path)
    template = read_template(job.dataset.get("template"))
    records = read_records(job.dataset["labeled_path"])
    scratch = tempfile.mkdtemp(prefix="distill-training-")
    try:
        arguments = sft_arguments(job, scratch)
        model, tokenizer = load_trainable(job.models["student"])
        limit = job.training.get("max_length")
        examples, too_long = build_examples(records, tokenizer, template, limit)
        _report_examples(job, examples, too_long, limit)
        curve = _fit(model, tokenizer, examples, arguments)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if template.chat_template:
        tokenizer.chat_template = template.chat_template
    with new_folder(job.output_dir) as folder:
        save_checkpoint(model, tokenizer, folder)
        lines = ["step,loss", *(f"{p['step']},{p['loss']}" for p in curve)]
        save_text(folder / LOSS_FILE, "\n".join(lines) + "\n")
        counts = {"examples": len(examples), "too_long": too_long}
        save_json(folder / "provenance.json", provenance(job, counts))
    return job.output_dir


def _report_examples(job: Job, examples: list[Any], too_long: int, limit: int | None) -> None:
    if not examples:
        raise EmptyDataError(
            f"{job.dataset['labeled_path']}: all {too_long} examples are over {limit} tokens;"
            " raise training.max_length"
        )
    tokens = sum(len(e["input_ids"]) for e in examples)
    line = f"training: {len(examples)} examples, {tokens} tokens"
    if too_long:
        line += f"; {too_long} left out as longer than {limit} tokens"
    print(line, file=sys.stderr, flush=True)


def _fit(model: Any, tokenizer: Any, examples: list[Any], arguments: Any) -> list[dict[str, float]]:
    """Train the model in place; return the loss curve."""
    from datasets import Dataset

    from distill_app.training.trainer import Progress, ResponseTrainer, set_deterministic

    set_deterministic(arguments.seed)
    progress = Progress(sum(len(e["input_ids"]) for e in examples))
    trainer = ResponseTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    _silence(trainer)
    trainer.train()
    return progress.curve


def _silence(trainer: Any) -> None:
    """Our progress lines replace the Trainer's printed dictionaries."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)

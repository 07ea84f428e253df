"""One training, from config to checkpoint."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_app.cards.card import training_card
from distill_app.cards.origin import copy_license, with_licences
from distill_app.core import statistics
from distill_app.core.errors import EmptyDataError
from distill_app.core.files import new_folder, read_records, require_free_space, save_json, save_text
from distill_app.core.logits import TopLogits, tokenizer_digest
from distill_app.core.models import Model, Tokenizer, load_tokenizer, load_trainable, save_checkpoint
from distill_app.training.config import (
    Job,
    logging_steps,
    objective_of,
    read_job,
    sft_arguments,
    splits_weights,
    token_budget,
)
from distill_app.training.examples import Examples, Template, build_examples, read_template, with_teacher
from distill_app.training.provenance import origin_of

CHECKPOINT_BYTES = 12  # a parameter, about: weights, rests and moments


def train_student(config_path: str, labeled_path: str | None = None, logits_path: str | None = None) -> str:
    """Train as an EasyDistill config says; return the folder of the finished checkpoint.

    The folder appears at once when all is done: weights, tokenizer, chat template, generation config, the
    model card `README.md`, `loss.csv` and `validation.csv` (step, loss), `metrics.json` and
    `provenance.json`. Until then checkpoints lie under `work/training`; a training that was killed goes on
    from the last whole one.

    Under `accelerate launch` every process calls this; the first one writes.

    Args:
        labeled_path, logits_path: in place of the config's own.

    Raises:
        ValueError, FileNotFoundError: in config, data or model; one line.
    """
    from distill_app.training.work import work_folder

    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that transformers and TRL still use
    job = read_job(config_path, labeled_path, logits_path)
    template = read_template(job.dataset.template)
    tokenizer = load_tokenizer(job.models.student)
    logits = _open_logits(job, tokenizer)
    examples = _examples(job, tokenizer, template, logits)
    origin = origin_of(job, logits, _world_size())
    with work_folder(job.output_dir, origin, is_first=_rank() == 0) as work:
        trainer, validation = _fit(job, tokenizer, examples, logits, work)
        model = _finished(job, trainer, work)
        if template.chat_template:
            tokenizer.chat_template = template.chat_template
        if _rank() == 0:
            with new_folder(job.output_dir) as folder:
                save_checkpoint(model, tokenizer, folder)
                _save_records(job, trainer.state, folder)
                origin = {**with_licences(origin), "examples": examples.counts()}
                save_json(folder / "provenance.json", origin)
                card = training_card(Path(job.output_dir).name, origin, validation)
                save_text(folder / "README.md", card)
                copy_license(job.models.student, folder)
        trainer.accelerator.wait_for_everyone()
    return job.output_dir


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _open_logits(job: Job, tokenizer: Tokenizer) -> TopLogits | None:
    if not job.is_white_box or not job.dataset.logits_path:
        return None
    path = job.dataset.logits_path
    logits = TopLogits(path)
    if not logits.top:
        raise ValueError(f"{path}: found no probabilities; set label.top_logits above 0 and label again")
    if tokenizer_digest(tokenizer) != logits.tokenizer:
        raise ValueError(
            f"{path}: the teacher {logits.teacher} has another tokenizer than {job.models.student};"
            " take a student of the teacher's family, or learn from words (kd_ratio: 0)"
        )
    return logits


def _examples(job: Job, tokenizer: Tokenizer, template: Template, logits: TopLogits | None) -> Examples:
    path, limit = job.dataset.labeled_path, job.max_length
    records = read_records(path)
    examples = build_examples(
        records,
        tokenizer,
        template,
        limit,
        cut_too_long=job.dataset.too_long == "cut",
        response_only=job.training.get("completion_only_loss") is not False,
        validation_fraction=job.validation.fraction,
        seed=job.dataset.seed,
    )
    if not examples.train:
        raise EmptyDataError(
            f"{path}: nothing to train on: of {len(records)} examples {examples.dropped} are over {limit}"
            f" tokens and {len(examples.validation)} held out; raise training.max_length"
        )
    if logits is not None:
        examples.train = with_teacher(examples.train, logits, tokenizer, len(records))
    if _rank() == 0:
        tokens = sum(len(e.input_ids) for e in examples.train)
        line = f"training: {len(examples.train)} examples, {tokens} tokens"
        if examples.validation:
            line += f"; {len(examples.validation)} held out"
        if changed := examples.dropped + examples.cut:
            done = "cut" if examples.cut else "left out"
            line += f"; {changed} longer than {limit} tokens {done}"
        print(line, file=sys.stderr, flush=True)
    return examples


def _fit(
    job: Job, tokenizer: Tokenizer, examples: Examples, logits: TopLogits | None, work: Path
) -> tuple[Any, dict[str, Any] | None]:
    """Train, from the last whole checkpoint if there is one.

    Returns:
        The trainer with the best weights, and their score on the held-out examples as the card takes it;
        None where none are held out.
    """
    from transformers import PrinterCallback

    from distill_app.training.batches import Collator
    from distill_app.training.progress import Patience, Progress
    from distill_app.training.trainer import DistillationTrainer, check_output_layer, set_deterministic
    from distill_app.training.work import Checkpoints, last_checkpoint

    arguments = sft_arguments(job, str(work), bool(examples.validation))
    set_deterministic(arguments.seed)
    split = splits_weights(job, arguments)
    model = _load_model(job, split)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    check_output_layer(model, examples.train[0], softcap)
    require_free_space(
        work, 2 * CHECKPOINT_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    trainer = DistillationTrainer(
        model,
        objective_of(job, logits, softcap),
        token_budget(job),
        split,
        args=arguments,
        data_collator=Collator(logits),
        train_dataset=examples.train,
        eval_dataset=examples.validation or None,
        processing_class=tokenizer,
        callbacks=[Checkpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(lambda: trainer.tokens_seen, bool(examples.validation)))
    if job.validation.patience and examples.validation:
        trainer.add_callback(Patience(job.validation.patience))
    checkpoint = last_checkpoint(work)
    if checkpoint and _rank() == 0:
        print(f"training: going on from {checkpoint.name}", file=sys.stderr, flush=True)
    held_out = examples.validation
    # A sharded model lies in one piece on no device before training
    before = [] if trainer.is_fsdp_enabled else trainer.example_losses(held_out)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not held_out:
        return trainer, None
    return trainer, {
        "examples": len(held_out),
        "loss": _token_loss(trainer.example_losses(held_out)),
        "before": _token_loss(before) if before else None,
    }


def _token_loss(losses: Sequence[tuple[float, int]]) -> statistics.Figure:
    """Return the loss a token, in nats, of each example's sum and count of tokens."""
    return statistics.ratio(*zip(*losses, strict=True))


def _load_model(job: Job, split: bool) -> Model:
    if job.lora:
        from distill_app.training.adapters import load_with_adapters

        return load_with_adapters(job)
    return load_trainable(job.models.student, in_bfloat16=split)[0]


def _finished(job: Job, trainer: Any, work: Path) -> Model:
    """Return the trained weights as one plain model in this process's memory."""
    if trainer.is_fsdp_enabled:  # each process has a part; together they write the whole
        trainer.save_model(str(work / "gathered"))
        trainer.accelerator.wait_for_everyone()
        return load_trainable(str(work / "gathered"))[0] if _rank() == 0 else None
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    # The moments have done their work; saving needs memory of its own
    trainer.optimizer = trainer.callback_handler.optimizer = None
    trainer.accelerator.free_memory()
    if job.lora:
        from distill_app.training.adapters import merged

        return merged(model, job.models.student) if _rank() == 0 else None
    return model


def _save_records(job: Job, state: Any, folder: Path) -> None:
    """Write the loss curves, and what a table of experiments wants of them."""
    from distill_app.training.progress import loss_curve, validation_curve

    training = loss_curve(state.log_history, logging_steps(job))
    validation = validation_curve(state.log_history)
    for name, curve in (("loss", training), ("validation", validation)):
        lines = ["step,loss", *(f"{step},{loss}" for step, loss in curve)]
        save_text(folder / f"{name}.csv", "\n".join(lines) + "\n")
    metrics: dict[str, float] = {"steps": state.global_step, "training_loss": training[-1][1]}
    if validation:
        metrics |= {"validation_loss": round(state.best_metric, 4), "best_step": state.best_global_step}
    save_json(folder / "metrics.json", metrics)

"""One training, from config to checkpoint."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import new_folder, require_free_space, save_json, save_text
from distill_app.core.logits import TopLogits, tokenizer_digest
from distill_app.core.models import (
    Model,
    Tokenizer,
    check_checkpoint,
    load_tokenizer,
    load_trainable,
    quiet_libraries,
    save_checkpoint,
)
from distill_app.easydistill.job import Job, at_commit, read_labeled
from distill_app.evaluation import statistics
from distill_app.report.cards.card import training_card
from distill_app.report.cards.origin import copy_license, with_licences
from distill_app.training.config import (
    DVCLIVE,
    logging_steps,
    max_length,
    objective_of,
    read_training,
    reporters,
    sft_arguments,
    splits_weights,
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

    quiet_libraries()
    job = read_training(config_path, labeled_path, logits_path)
    _refuse_deepspeed(job)
    job = at_commit(job)
    template = read_template(job.dataset.template)
    tokenizer = load_tokenizer(job.models.student, job.models.student_revision)
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
                check_checkpoint(folder)
        trainer.accelerator.wait_for_everyone()
    return job.output_dir


def _refuse_deepspeed(job: Job) -> None:
    """Raise ValueError where accelerate was launched with DeepSpeed, which moves the weights at each part."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" or job.training.get("deepspeed"):
        raise ValueError(f"{job.path}: the trainer does not run under DeepSpeed; use accelerate: fsdp")


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _open_logits(job: Job, tokenizer: Tokenizer) -> TopLogits | None:
    if not job.is_white_box:
        return None
    path = job.dataset.logits_path
    if not path:
        raise ValueError(
            f"{job.path}: dataset.logits_path: missing, and a white-box job learns from more than words;"
            " label first (run_easy_distill does), or give --logits"
        )
    logits = TopLogits(path)
    if not logits.top:
        raise ValueError(
            f"{path}: found no probabilities; set label.top_logits (of System 2 score_s2.top_logits) above 0"
            " and run that stage again"
        )
    if tokenizer_digest(tokenizer, logits.vocab_size) != logits.tokenizer:
        raise ValueError(
            f"{path}: the teacher {logits.teacher} has another tokenizer than {job.models.student};"
            " take a student of the teacher's family, or learn from words (kd_ratio: 0)"
        )
    return logits


def _examples(job: Job, tokenizer: Tokenizer, template: Template, logits: TopLogits | None) -> Examples:
    path, limit = job.dataset.labeled_path, max_length(job)
    records = read_labeled(path)
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
        The trainer with the best weights, and their loss on the held-out examples as the card takes it;
        None where none are held out.
    """
    from transformers import PrinterCallback

    from distill_app.training.batches import Collator
    from distill_app.training.memory import tokens_at_a_time
    from distill_app.training.noise import add_noise
    from distill_app.training.progress import Patience, Progress
    from distill_app.training.trainer import DistillationTrainer, check_output_layer, set_deterministic
    from distill_app.training.work import Checkpoints, last_checkpoint

    arguments = sft_arguments(job, str(work), bool(examples.validation))
    set_deterministic(arguments.seed)
    split = splits_weights(job, arguments)
    model = _load_model(job, split)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    check_output_layer(model, examples.train[0], softcap)
    if alpha := job.training.get("neftune_noise_alpha"):
        add_noise(model.get_base_model() if job.lora else model, alpha)
    require_free_space(
        work, 2 * CHECKPOINT_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    trainer = DistillationTrainer(
        model,
        objective_of(job, logits, softcap),
        tokens_at_a_time(job, model, arguments, split),
        split,
        job.batching.tokens_per_step,
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
    if DVCLIVE in reporters(job):
        from distill_app.training.live import LiveFigures

        trainer.add_callback(LiveFigures(Path(job.output_dir).name))
    if _rank() == 0:
        _tell_batches(trainer)
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


def _tell_batches(trainer: Any) -> None:
    """Print how many tokens a step has and how many go through the model at a time, and an idle GPU."""
    batches = trainer.step_batches()
    tokens = sum(batches.lengths) // len(batches)
    line = (
        f"training: {len(batches)} step{'s' * (len(batches) != 1)} an epoch of about {tokens} tokens,"
        f" at most {trainer.tokens_at_a_time} at a time on {trainer.args.device}"
    )
    if trainer.args.device.type == "cuda" and trainer.args.world_size == 1:
        import torch

        others = torch.cuda.device_count() - 1
        line += f"; {others} more GPUs stand idle, accelerate: ddp takes all" if others else ""
    print(line, file=sys.stderr, flush=True)


def _token_loss(losses: Sequence[tuple[float, int]]) -> statistics.Figure:
    """Return the loss a token, in nats, of each example's sum and count of tokens."""
    return statistics.rate(*zip(*losses, strict=True))


def _load_model(job: Job, split: bool) -> Model:
    if job.lora:
        from distill_app.training.adapters import load_with_adapters

        return load_with_adapters(job)
    models = job.models
    return load_trainable(models.student, in_bfloat16=split, revision=models.student_revision)[0]


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

        return merged(model, job) if _rank() == 0 else None
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

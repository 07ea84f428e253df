"""One on-policy distillation, from trained student to refined student."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import new_folder, read_json, require_free_space, save_json, save_text
from distill_app.core.models import (
    Model,
    Quantization,
    Tokenizer,
    check_checkpoint,
    cpu_multiplies_bf16,
    load_teacher,
    load_tokenizer,
    load_trainable,
    quiet_libraries,
    save_checkpoint,
)
from distill_app.core.prompts import Mode
from distill_app.refining.params import RefineParams
from distill_app.refining.prompts import Prompt, build_prompts
from distill_app.refining.teacher import fit_head, require_shared_tokenizer
from distill_app.report.cards.card import training_card
from distill_app.report.cards.origin import copy_license, digest_of, made_from, with_licences

OFF = "off.json"  # what a folder holds whose refinement is switched off
BETA = {"forward_kld": 0.0, "jsd": 0.5, "reverse_kld": 1.0}  # GKD's interpolation, arXiv:2306.13649
CHECKPOINT_BYTES = 16  # a parameter: float32 weights and moments
PACKAGES = ("torch", "transformers", "trl", "accelerate")
COLUMNS = {
    "on_policy": "on_policy",
    "loss": "divergence",
    "entropy": "entropy",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut",
}


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher's weights are, and what it is told before each prompt."""

    model: str
    revision: str | None = None
    quantization: Quantization = "none"
    system_prompt: str | None = None
    engine: str = "transformers"  # that labels; behind a server there are no weights


def refine_student(
    params: RefineParams,
    teacher: TeacherSource,
    student: str,
    data_path: str,
    out_dir: str,
    mode: Mode,
    metrics_path: str,
) -> dict[str, float]:
    """Let a trained student learn from the teacher's judgement of its own answers; return the metrics.

    The folder appears at once when all is done: a checkpoint as training writes it, with `refinement.csv` (a
    line a step) and `metrics.json`. With `steps: 0` it holds `off.json` alone, and no model is loaded. A run
    that was killed goes on from its last whole checkpoint under `work/training`; on a CPU it ends with the
    same bytes.

    Args:
        student: checkpoint folder to start from.
        data_path: records of `instruction`, `input`, `output`; the outputs are what is learned in the steps
            that are not on-policy.
        metrics_path: gets the metrics, and the steps' figures beside it as CSV.

    Returns:
        `steps`; the mean over the last quarter of the on-policy steps of `divergence` (nats a token),
        `tokens` (an answer) and `cut` (share at the token limit); `divergence_before`, over the first
        quarter. Steps alone where refinement is off.

    Raises:
        EmptyDataError: no record fits.
        ValueError: the tokenizers differ.
        OSError: a model is not to be had.
    """
    if not params.steps:
        with new_folder(out_dir) as folder:
            save_json(folder / OFF, {"steps": 0})
        _save(metrics_path, {"steps": 0}, [])
        return {"steps": 0}
    if teacher.engine == "openai":
        raise ValueError(
            f"{Path(metrics_path).stem}.steps: found {params.steps} with label.engine: openai, expected 0,"
            " for a server keeps the teacher's weights; take engine transformers or vllm"
        )
    from distill_app.training.work import work_folder

    quiet_libraries()
    ours = load_tokenizer(student)
    theirs = load_tokenizer(teacher.model, teacher.revision)
    require_shared_tokenizer(teacher.model, theirs, student, ours)
    origin = _origin(params, teacher, student, data_path)
    with work_folder(out_dir, origin) as work:
        model = load_trainable(student)[0]
        prompts = _prompts(data_path, ours, theirs, mode, teacher.system_prompt, model, params)
        trainer = _trainer(params, model, _load_fitted(teacher, model, theirs, ours), ours, prompts, work)
        _train(trainer, work)
        steps = _steps(trainer.state.log_history)
        metrics = _metrics(steps)
        with new_folder(out_dir) as folder:
            save_checkpoint(trainer.accelerator.unwrap_model(trainer.model_wrapped), ours, folder)
            save_text(folder / "refinement.csv", steps_csv(steps))
            add_records(folder, Path(out_dir).name, student, metrics, origin)
    _save(metrics_path, metrics, steps)
    return metrics


def add_records(
    folder: Path, name: str, student: str, metrics: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Put beside a refined student's weights what tells of them, and make sure that the folder is whole."""
    origin = with_licences(origin)
    save_json(folder / "metrics.json", metrics)
    save_json(folder / "provenance.json", origin)
    save_text(folder / "README.md", training_card(name, origin))
    copy_license(student, folder)
    check_checkpoint(folder)


def csv_table(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV under a line of names; what a row lacks is empty."""
    lines = [",".join(str(row.get(name, "")) for name in names) for row in rows]
    return "\n".join([",".join(names), *lines]) + "\n"


def _save(metrics_path: str, metrics: dict[str, float], steps: list[dict[str, float]]) -> None:
    save_json(metrics_path, metrics)
    save_text(Path(metrics_path).with_suffix(".csv"), steps_csv(steps))


def _prompts(
    data_path: str,
    ours: Tokenizer,
    theirs: Tokenizer,
    mode: Mode,
    system_prompt: str | None,
    model: Model,
    params: RefineParams,
) -> list[Prompt]:
    records = read_json(data_path)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    found = build_prompts(records, ours, theirs, mode, system_prompt, limit - params.max_new_tokens)
    if not found:
        raise EmptyDataError(
            f"{data_path}: nothing to refine with: none of {len(records)} records fits {limit} tokens with"
            f" {params.max_new_tokens} to write; lower max_new_tokens"
        )
    left_out = f"; {len(records) - len(found)} too long, left out" if len(found) < len(records) else ""
    print(f"refining: {len(found)} prompts{left_out}", file=sys.stderr, flush=True)
    return found


def _load_fitted(teacher: TeacherSource, student: Model, theirs: Tokenizer, ours: Tokenizer) -> Model:
    model = load_teacher(teacher.model, teacher.quantization, teacher.revision)[0]
    rows = len(student.get_output_embeddings().weight)
    fit_head(model, rows, theirs.eos_token_id, ours.eos_token_id)
    return model.requires_grad_(False)


def _trainer(
    params: RefineParams,
    model: Model,
    teacher: Model,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    work: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DistillationConfig

    from distill_app.refining.trainer import OnPolicyTrainer
    from distill_app.training.trainer import set_deterministic, use_one_device
    from distill_app.training.work import Checkpoints

    has_gpu = torch.cuda.is_available()
    arguments = DistillationConfig(
        output_dir=str(work),
        max_steps=params.steps,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=params.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        beta=BETA[params.divergence],
        temperature=params.temperature,
        max_completion_length=params.max_new_tokens,
        activation_checkpointing=params.gradient_checkpointing,
        bf16=torch.cuda.is_bf16_supported() if has_gpu else cpu_multiplies_bf16(),
        use_cpu=not has_gpu,
        dataloader_pin_memory=has_gpu,
        shuffle_dataset=False,  # the rows lie in the order of the steps
        save_steps=params.save_steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=params.seed,
        data_seed=params.seed,
    )
    use_one_device(arguments)
    set_deterministic(params.seed)
    require_free_space(work, 2 * CHECKPOINT_BYTES * sum(p.numel() for p in model.parameters()))
    rows = Dataset.from_dict({"prompt": _order(len(prompts), params)})
    trainer = OnPolicyTrainer(
        model,
        teacher,
        arguments,
        rows,
        prompts=prompts,
        on_policy=params.on_policy,
        processing_class=tokenizer,
        callbacks=[Checkpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _order(count: int, params: RefineParams) -> list[int]:
    """Return the record of each row of each step: all of them in an order of the seed's, then all again."""
    wanted, found = params.steps * params.batch_size, list[int]()
    for epoch in range(-(-wanted // count)):
        found += sorted(
            range(count), key=lambda n: hashlib.sha256(f"{params.seed} {epoch} {n}".encode()).digest()
        )
    return found[:wanted]


def _train(trainer: Any, work: Path) -> None:
    from distill_app.training.progress import Progress
    from distill_app.training.work import last_checkpoint

    trainer.add_callback(Progress(lambda: trainer.state.num_input_tokens_seen, False))
    checkpoint = last_checkpoint(work)
    if checkpoint:
        print(f"refining: going on from {checkpoint.name}", file=sys.stderr, flush=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _steps(history: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return a dictionary a step, from the Trainer's own history, which a resumed run has in full."""
    return [
        {"step": entry["step"], **{name: round(entry[key], 6) for key, name in COLUMNS.items()}}
        for entry in history
        if "on_policy" in entry
    ]


def _metrics(steps: list[dict[str, float]]) -> dict[str, float]:
    drawn = [step for step in steps if step["on_policy"]]
    quarter = -(-len(drawn) // 4)
    found: dict[str, float] = {"steps": len(steps)}
    if drawn:
        found["divergence_before"] = _mean(drawn[:quarter], "divergence")
        found |= {name: _mean(drawn[-quarter:], name) for name in ("divergence", "tokens", "cut")}
    return found


def _mean(steps: list[dict[str, float]], name: str) -> float:
    return round(sum(step[name] for step in steps) / len(steps), 4)


def steps_csv(steps: list[dict[str, float]]) -> str:
    """Return a table of the steps; without any the line of names alone."""
    return csv_table(["step", *COLUMNS.values()], steps)


def _origin(params: RefineParams, teacher: TeacherSource, student: str, data_path: str) -> dict[str, Any]:
    """Return what a refinement is made from, without times, hosts or absolute paths."""
    return {
        "backend": "builtin",
        "job_type": "on_policy",
        **made_from(student, teacher.model, data_path, None, None, teacher.revision),
        "quantization": "none",
        "teacher_quantization": teacher.quantization,
        "training": params.model_dump(),
        "trainer_sha256": digest_of(sorted(Path(__file__).parent.glob("*.py"))),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }

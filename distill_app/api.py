"""The public entry points: the boundary where errors become the contract's printed messages."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_app.core.errors import EmptyDataError, SchemaError
from distill_app.core.files import Record, batched, iter_records, save_records
from distill_app.core.models import Model, Tokenizer, is_local_path, load_student, load_teacher
from distill_app.core.stage import one_line
from distill_app.data.instructions import InstructionRules, prepare_instructions
from distill_app.data.reasoning import TraceRules, prepare_traces
from distill_app.data.selection import Outputs
from distill_app.data.sources import Dataset
from distill_app.easydistill.config import write_system1_config, write_system2_config
from distill_app.easydistill.job import iter_labeled
from distill_app.easydistill.run import run_easy_distill
from distill_app.generation.answers import Sampling
from distill_app.generation.infer import infer_student
from distill_app.labeling.label import ask_teacher, select_answers

TEACHER = "Qwen/Qwen2.5-7B-Instruct"
SYSTEM1_STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"
SYSTEM2_STUDENT = "Qwen/Qwen2.5-1.5B-Instruct"
SYSTEM1_DIR = "./distilled-qwen2.5-0.5b"
SYSTEM2_DIR = "./distilled-qwen2.5-1.5b-cot"
NO_DATA = "No data for System {} distillation"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEACHER_SHOWN = 300  # characters of the teacher's answer that compare_models prints


def distill_system1(config: dict[str, Any]) -> str | None:
    """Distil System 1 (instruction following); return its checkpoint folder, or None after a failure.

    Args:
        config: all keys are optional. teacher_model ("Qwen/Qwen2.5-7B-Instruct"), student_model
            ("Qwen/Qwen2.5-0.5B-Instruct"), labeled_path ("data/train_labeled.json"), num_epochs (1),
            out_dir ("./distilled-qwen2.5-0.5b"), config_path ("configs/kd_black_box_qwen_0_5b.json");
            and instruction_path, training (fields of SFTConfig), backend ("builtin" or "easydistill").
            What `instruction_path` holds and `labeled_path` lacks is asked of the teacher; without the key
            the labelled data is all there is, and the teacher is asked nothing.
    """
    student = config.get("student_model", SYSTEM1_STUDENT)
    labeled_path = config.get("labeled_path", "data/train_labeled.json")
    if not _can_train("1", student, labeled_path):
        return None
    out_dir = config.get("out_dir", SYSTEM1_DIR)
    path = write_system1_config(
        config_path=config.get("config_path", "configs/kd_black_box_qwen_0_5b.json"),
        teacher_model=config.get("teacher_model", TEACHER),
        student_model=student,
        instruction_path=config.get("instruction_path", labeled_path),
        labeled_path=labeled_path,
        out_dir=out_dir,
        num_epochs=config.get("num_epochs", 1),
        training=config.get("training"),
    )
    return out_dir if run_easy_distill(path, config.get("backend")) == 0 else None


def distill_system2(config: dict[str, Any]) -> str | None:
    """Distil System 2 (step-by-step reasoning); return its checkpoint folder, or None after a failure.

    Args:
        config: all keys are optional. student_model ("Qwen/Qwen2.5-1.5B-Instruct"), cot_path
            ("data/omnithought_cot.json"), num_epochs (1), out_dir ("./distilled-qwen2.5-1.5b-cot"),
            config_path ("configs/kd_cot_qwen_1_5b.json"); and training (fields of SFTConfig), backend.
    """
    student = config.get("student_model", SYSTEM2_STUDENT)
    cot_path = config.get("cot_path", "data/omnithought_cot.json")
    if not _can_train("2", student, cot_path):
        return None
    out_dir = config.get("out_dir", SYSTEM2_DIR)
    path = write_system2_config(
        config_path=config.get("config_path", "configs/kd_cot_qwen_1_5b.json"),
        student_model=student,
        cot_path=cot_path,
        out_dir=out_dir,
        num_epochs=config.get("num_epochs", 1),
        training=config.get("training"),
    )
    return out_dir if run_easy_distill(path, config.get("backend")) == 0 else None


def _can_train(system: str, student: Any, data_path: str) -> bool:
    """Print why not, in the contract's words."""
    if not _is_model_name(student):
        print(f"Invalid student model: {student}")
        print(f"Example: {SYSTEM1_STUDENT if system == '1' else SYSTEM2_STUDENT}")
        return False
    try:
        for _ in iter_labeled(data_path):
            pass
    except (FileNotFoundError, EmptyDataError):
        print(NO_DATA.format(system))
        return False
    except (ValueError, OSError) as err:
        print(one_line(err))
        return False
    return True


def _is_model_name(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    if is_local_path(name):
        return (Path(name) / "config.json").is_file()
    return HUB_ID.fullmatch(name) is not None


def prepare_system1_dataset(
    slice_str: str = "train[:1000]",
    teacher_model: Model | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    relabel_with_teacher: bool = False,
    out_instructions: str = "data/train_instructions.json",
    out_labeled: str = "data/train_labeled.json",
    dataset: str = "alibaba-pai/DistilQwen_100k",
    revision: str | None = None,
) -> None:
    """Write System 1's instructions, and their labels: the dataset's own or the teacher's.

    Args:
        slice_str: which rows, as `datasets` reads it.
        teacher_model, teacher_tokenizer: from `load_teacher`; loaded here if needed and absent.
        out_instructions, out_labeled: a path that ends in .jsonl or .parquet gives that format.
        dataset: Hub id, or a local folder or file.

    Raises:
        SchemaError, ValueError, OSError: the dataset cannot be read; one line.
    """
    try:
        outputs = Outputs(out_instructions)
        source = Dataset(dataset, slice_str, revision)
        metrics = prepare_instructions(source, InstructionRules(), 0.0, 0, outputs)
    except EmptyDataError:
        print(NO_DATA.format("1"))
        return
    _print_dropped(metrics, metrics["rows_in"], "rows")
    labeled: Iterable[Record] = (r for r in iter_records(out_instructions) if r["output"].strip())
    if relabel_with_teacher:
        if teacher_model is None or teacher_tokenizer is None:
            teacher_model, teacher_tokenizer = load_teacher(TEACHER)
        labeled = _relabeled(out_instructions, teacher_model, teacher_tokenizer)
    kept = save_records(out_labeled, labeled)
    if kept < metrics["train"]:
        print(f"{metrics['train'] - kept} of {metrics['train']} instructions left out: no whole answer")


def _relabeled(path: str, model: Model, tokenizer: Tokenizer) -> Iterator[Record]:
    """Yield the records of a file with the teacher's whole answers, asked a few thousand at a time."""
    sampling = Sampling(max_new_tokens=256, temperature=0.8, top_p=0.9)
    for records in batched(iter_records(path), 4096):
        answers = ask_teacher(model, tokenizer, records, sampling, 16, "system1", "label")
        yield from select_answers(records, answers, "drop")[0]


def prepare_system2_dataset(
    slice_str: str = "train[:2000]",
    rv_min: int | None = None,
    cd_min: int | None = None,
    out_cot: str = "data/omnithought_cot.json",
    rv_max: int | None = None,
    cd_max: int | None = None,
    verified_only: bool = True,
    max_traces: int | None = None,
    dataset: str = "alibaba-pai/OmniThought",
    revision: str | None = None,
) -> None:
    """Write System 2's reasoning traces as `{instruction, input, output}`; output is the chain of thought.

    Args:
        rv_min, rv_max, cd_min, cd_max: inclusive bounds on Reasoning Verbosity and Cognitive Difficulty,
            0 to 9; None leaves a side open.
        verified_only: leave out traces that are marked as wrong.
        max_traces: at most so many a question, the shortest; None takes all.
        out_cot: a path that ends in .jsonl or .parquet gives that format.

    Raises:
        ValueError, OSError: the dataset cannot be read; one line.
    """
    rules = TraceRules(rv_min, rv_max, cd_min, cd_max, verified_only, max_traces=max_traces)
    try:
        metrics = prepare_traces(Dataset(dataset, slice_str, revision), rules, 0.0, 0, Outputs(out_cot))
    except SchemaError:
        print("Unexpected OmniThought schema, please inspect omni[0]")
    except EmptyDataError:
        print(NO_DATA.format("2"))
    else:
        _print_dropped(metrics, metrics["traces_in"], "traces")


def _print_dropped(metrics: dict[str, Any], count: int, what: str) -> None:
    dropped = metrics["dropped"]
    if dropped:
        took = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        print(f"{sum(dropped.values())} of {count} {what} left out: {took}")


def compare_models(
    prompts: list[str],
    teacher_path: str | None = TEACHER,
    system1_path: str | None = SYSTEM1_DIR,
    system2_path: str | None = SYSTEM2_DIR,
    teacher_model: Model | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    sys1_model: Model | None = None,
    sys1_tokenizer: Tokenizer | None = None,
    sys2_model: Model | None = None,
    sys2_tokenizer: Tokenizer | None = None,
    max_tokens_teacher: int = 256,
    max_tokens_sys1: int = 256,
    max_tokens_sys2: int = 256,
) -> None:
    """Print for each prompt the answers of teacher, System 1 and System 2, side by side.

    A model that is not given and cannot be loaded from its path is told and left out.
    """
    teacher = _given_or_loaded(teacher_model, teacher_tokenizer, teacher_path, load_teacher)
    sys1 = _given_or_loaded(sys1_model, sys1_tokenizer, system1_path, load_student)
    sys2 = _given_or_loaded(sys2_model, sys2_tokenizer, system2_path, load_student)
    for prompt in prompts:
        print(f"Prompt: {prompt}")
        if teacher:
            items = [{"instruction": prompt}]
            answer = ask_teacher(*teacher, items, Sampling(max_tokens_teacher), 1, "system1")[0].text
            cut = answer if len(answer) <= TEACHER_SHOWN else answer[:TEACHER_SHOWN] + "..."
            print(f"Teacher: {cut}")
        if sys1:
            print(f"System 1 student: {infer_student(*sys1, prompt, 'system1', max_tokens_sys1)}")
        if sys2:
            print(f"System 2 student: {infer_student(*sys2, prompt, 'system2', max_tokens_sys2)}")
        print()


def _given_or_loaded(
    model: Model | None, tokenizer: Tokenizer | None, path: str | None, load: Any
) -> tuple[Model, Tokenizer] | None:
    if model is not None and tokenizer is not None:
        return model, tokenizer
    if path is None:
        return None
    try:
        return load(path)
    except Exception as err:  # whatever a broken checkpoint makes transformers raise
        print(f"Model not found at {path}")
        if not isinstance(err, FileNotFoundError):
            print(f"  ({one_line(err)[:200]})")
        return None

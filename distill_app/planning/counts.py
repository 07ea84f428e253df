"""How many texts a stage will have, and how long they are: counted where the data is local, else assumed."""

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_app.core.files import read_records
from distill_app.core.models import is_local_path
from distill_app.core.prompts import Mode, format_prompt, format_response
from distill_app.data.instructions import prepare_instructions
from distill_app.data.params import PrepareS1Params, PrepareS2Params
from distill_app.data.reasoning import prepare_traces
from distill_app.data.selection import BYTES_A_TOKEN, Outputs
from distill_app.planning.work import Texts

PROMPT_TOKENS = 100  # assumed of a Hub dataset's instructions and questions, which are not read here
# Lengths of answers are spread about exponentially: with a mean of half the limit, a fifth are cut there and
# the others have a mean of 3/8 of the limit. In the default run the teacher's labels have 46 % of the
# limit and 21 % are cut (metrics/label.json).
ANSWER_SHARE = 0.5
CUT_SHARE = 0.2
WHOLE_SHARE = (ANSWER_SHARE - CUT_SHARE) / (1 - CUT_SHARE)
ROWS = re.compile(r"\w+\[(\d*):(\d+)\]")


@dataclass(frozen=True)
class Selected:
    """What a prepare stage will write: texts to train on and texts held out."""

    train: Texts
    heldout: Texts
    is_counted: bool  # from the data itself; else from the slice and assumed lengths


def selected(
    params: PrepareS1Params | PrepareS2Params, mode: Mode, tokenizer: Any, answer: float
) -> Selected:
    """Return what is selected: by the stage's own rules where all data is local, else by the slices.

    Args:
        tokenizer: of the student; None takes a quarter of the bytes.
        answer: tokens of an answer where the data is not read.

    Raises:
        ValueError: a slice of a Hub dataset that does not say its number of rows.
        OSError, ValueError: local data that the stage could not read either.
    """
    sources = [params, *params.mix]
    if all(is_local_path(one.dataset) for one in sources):
        return _counted(params, mode, tokenizer)
    rows = sum(_rows(one.dataset, one.slice) for one in sources)
    texts = Texts(rows, rows * PROMPT_TOKENS, rows * answer)
    return Selected(texts * (1 - params.heldout_fraction), texts * params.heldout_fraction, False)


def _rows(dataset: str, slice_str: str) -> int:
    found = ROWS.fullmatch(slice_str)
    if found is None:
        raise ValueError(
            f"{dataset}: slice {slice_str} does not say how many rows; write it as train[:1000] to plan it"
        )
    return int(found[2]) - int(found[1] or 0)


def _counted(params: PrepareS1Params | PrepareS2Params, mode: Mode, tokenizer: Any) -> Selected:
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as folder:
        train, heldout = f"{folder}/train.json", f"{folder}/heldout.json"
        outputs = Outputs(train, heldout)
        if isinstance(params, PrepareS1Params):
            prepare_instructions(**params.arguments(), rules=params.rules(), outputs=outputs)
        else:
            prepare_traces(**params.arguments(), rules=params.rules(), outputs=outputs)
        found = [count_texts(read_records(path), mode, tokenizer) for path in (train, heldout)]
    return Selected(found[0], found[1], True)


def count_texts(records: Iterable[Any], mode: Mode, tokenizer: Any) -> Texts:
    """Return the number and tokens of records, as training counts them; None for a quarter of the bytes."""
    count, prompts, answers = 0, 0.0, 0.0
    for record in records:
        count += 1
        prompts += _tokens(format_prompt(record["instruction"], record["input"], mode), tokenizer)
        answers += _tokens(format_response(record["output"]), tokenizer) + 1  # the end of the sequence
    return Texts(count, prompts, answers)


def _tokens(text: str, tokenizer: Any) -> float:
    return len(text.encode()) / BYTES_A_TOKEN if tokenizer is None else len(tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class Task:
    """A benchmark's size: questions, the choices of each, and tokens of a text."""

    questions: int
    choices: int
    prompt_tokens: int
    is_written: bool = False  # whether the model writes an answer, up to the task's max_gen_toks


TEMPLATE_TOKENS = 8  # of the words around a question, and of a choice
# Questions and choices as their papers say; tokens of a prompt are assumed, with the solved examples of gsm8k
TASKS = {
    "ifeval": Task(541, 1, 60, True),
    "gsm8k": Task(1319, 1, 900, True),
    "math500": Task(500, 1, 120, True),
    "arc_easy": Task(2376, 4, 40),
    "arc_challenge": Task(1172, 4, 45),
    "hellaswag": Task(10042, 4, 100),
    "mmlu": Task(14042, 4, 120),
}


def task_of(name: str, task_dir: str) -> Task | None:
    """Return a benchmark's size, None where it is not known: of the table, or of a folder of questions."""
    if name in TASKS:
        return TASKS[name]
    files = list(Path(task_dir, name).glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        return None
    values = list(json.loads(lines[0]).values())
    choices = max((len(value) for value in values if isinstance(value, list)), default=1)
    question = max((len(value) for value in values if isinstance(value, str)), default=0)
    return Task(len(lines), choices, question // BYTES_A_TOKEN + TEMPLATE_TOKENS)

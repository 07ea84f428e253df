"""The teacher's answers to a list of instructions."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import Record
from distill_app.core.models import Model, Tokenizer
from distill_app.core.prompts import Mode, teacher_prompt
from distill_app.labeling.answers import Answer, Sampling
from distill_app.labeling.engine import generate
from distill_app.labeling.params import LabelParams

OnTruncated = Literal["drop", "keep"]


def label_with_teacher(
    teacher_model: Model,
    teacher_tokenizer: Tokenizer,
    items: Sequence[Mapping[str, str]],
    batch_size: int = 2,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.9,
    mode: Mode = "system1",
    seed: int = 0,
) -> list[dict[str, str]]:
    """Return the items with the teacher's answer as `output`, all of them and in their order.

    An answer cut at `max_new_tokens` is kept as it is; `ask_teacher` and `select_answers` tell them apart.

    Args:
        items: `{instruction, input}`; `input` may be absent, an `output` is replaced.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    answers = ask_teacher(teacher_model, teacher_tokenizer, items, sampling, batch_size, mode)
    return [{**_as_record(i), "output": a.text} for i, a in zip(items, answers, strict=True)]


def ask_teacher(
    model: Model,
    tokenizer: Tokenizer,
    items: Sequence[Mapping[str, str]],
    sampling: Sampling,
    batch_size: int,
    mode: Mode,
    label: str = "",
) -> list[Answer]:
    """Return one answer an item; identical prompts are asked once."""
    prompts = [teacher_prompt(tokenizer, i["instruction"], i.get("input") or "", mode) for i in items]
    unique = list(dict.fromkeys(prompts))
    answers = generate(model, tokenizer, unique, sampling, batch_size, label)
    by_prompt = dict(zip(unique, answers, strict=True))
    return [by_prompt[p] for p in prompts]


def select_answers(
    items: Sequence[Mapping[str, str]], answers: Sequence[Answer], on_truncated: OnTruncated
) -> tuple[list[Record], dict[str, Any]]:
    """Return the records worth training on, and counts: what was asked, kept, dropped and why.

    An empty answer is always dropped; one cut by the token limit as `on_truncated` says, since a student
    trained on it would learn to stop in mid-sentence.
    """
    kept: list[Record] = []
    dropped = {"empty": 0, "truncated": 0}
    for item, answer in zip(items, answers, strict=True):
        if not answer.text:
            dropped["empty"] += 1
        elif answer.finish_reason == "length" and on_truncated == "drop":
            dropped["truncated"] += 1
        else:
            kept.append({**_as_record(item), "output": answer.text})
    lengths = sorted(a.tokens for a in answers)
    return kept, {
        "instructions": len(items),
        "kept": len(kept),
        "dropped": dropped,
        "tokens_out": sum(lengths),
        "tokens_mean": round(sum(lengths) / max(len(lengths), 1), 1),
        "tokens_p95": lengths[int(0.95 * (len(lengths) - 1))] if lengths else 0,
    }


def _as_record(item: Mapping[str, str]) -> Record:
    return {"instruction": item["instruction"], "input": item.get("input") or ""}


def label_splits(
    model: Model,
    tokenizer: Tokenizer,
    train: Sequence[Record],
    heldout: Sequence[Record],
    params: LabelParams,
) -> tuple[list[Record], list[Record], dict[str, Any]]:
    """Return System 1's labelled training and held-out records, and counts of each.

    Raises:
        EmptyDataError: no answer of a split is worth keeping.
    """
    sampling = Sampling(params.max_new_tokens, params.temperature, params.top_p, params.seed)
    items = [*train, *heldout]
    answers = ask_teacher(model, tokenizer, items, sampling, params.batch_size, "system1", "label")
    cut = len(train)
    labeled, metrics = select_answers(train, answers[:cut], params.on_truncated)
    labeled_heldout, heldout_metrics = select_answers(heldout, answers[cut:], params.on_truncated)
    if not labeled or not labeled_heldout:
        raise EmptyDataError(
            f"label: no usable answer in a split (training: {metrics}, held out: {heldout_metrics});"
            " raise label.max_new_tokens, or set label.on_truncated: keep"
        )
    return labeled, labeled_heldout, {"train": metrics, "heldout": heldout_metrics}

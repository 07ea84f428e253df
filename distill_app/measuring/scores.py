"""Scores of single answers: overlap with the teacher, right final answers, reasoning steps, loss."""

import re
from collections.abc import Sequence

from distill_app.core.models import Model, Tokenizer

STEP = re.compile(r"=|^\s*(?:step\s*\d+|\d+[.)])", re.IGNORECASE)
FINAL = re.compile(r"\\boxed|\banswer is\b|^\s*answer:", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\s*\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}")  # braces in it two deep


def chrf(answer: str, reference: str) -> float:
    """Return the chrF of one answer, 0 to 100 (Popović 2015, as sacrebleu computes it)."""
    from sacrebleu import sentence_chrf

    return round(sentence_chrf(answer, [reference]).score, 2)


def is_right(answer: str, reference: str) -> bool | None:
    """Tell whether the final answer equals the reference's, as math-verify reads both.

    The last `\\boxed{}` counts before a bare number, the last of which counts else. None where the reference
    has no answer that can be read.
    """
    from math_verify import parse, verify

    gold = parse(_final(reference), raise_on_error=False)
    if not gold:
        return None
    found = parse(_final(answer), raise_on_error=False)
    return bool(found) and bool(verify(gold, found, raise_on_error=False))


def _final(text: str) -> str:
    """Return the last `\\boxed{}` alone, since math-verify makes a set of several; else the text."""
    boxes = BOXED.findall(text)
    return boxes[-1] if boxes else text


def count_steps(answer: str) -> int:
    """Return how many lines or sentences of the answer calculate or are numbered, the final one aside."""
    units = re.split(r"\n+|(?<=[.!?])\s+(?=[A-Z])", answer)
    return sum(1 for unit in units if STEP.search(unit) and not FINAL.search(unit))


def response_losses(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], responses: Sequence[str]
) -> list[tuple[float, int]]:
    """Return for each response its negative log-likelihood given its prompt, in nats, and its tokens.

    The end-of-sequence token counts.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses = []
    with torch.inference_mode():
        for prompt, response in zip(prompts, responses, strict=True):
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            tail = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([head + tail], device=model.device)
            logits = model(input_ids=ids, logits_to_keep=len(tail) + 1).logits[0, :-1].float()
            target = torch.tensor(tail, device=model.device)
            losses.append((cross_entropy(logits, target, reduction="sum").item(), len(tail)))
    return losses

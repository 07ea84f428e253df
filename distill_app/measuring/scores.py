"""Scores of single answers: overlap with the teacher, right final answers, reasoning steps, loss."""

import re
from collections.abc import Sequence

from distill_app.core.models import Model, Tokenizer

STEP = re.compile(r"=|^\s*(?:step\s*\d+|\d+[.)])", re.IGNORECASE)
FINAL = re.compile(r"\\boxed|\banswer is\b|^\s*answer:", re.IGNORECASE)


def chrf(answer: str, reference: str) -> float:
    """Return the chrF of one answer, 0 to 100 (Popović 2015, as sacrebleu computes it)."""
    from sacrebleu import sentence_chrf

    return round(sentence_chrf(answer, [reference]).score, 2)


def is_right(answer: str, reference: str) -> bool:
    """Tell whether the final answer equals the reference's, as math-verify reads both.

    A `\\boxed{}` answer counts before a bare number; where there are several, the last one.
    """
    from math_verify import parse, verify

    gold = parse(reference, raise_on_error=False)
    found = parse(answer, raise_on_error=False)
    return bool(gold) and bool(found) and bool(verify(gold, found, raise_on_error=False))


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

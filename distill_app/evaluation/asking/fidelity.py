"""How near a model is to its teacher, token by token, which needs no reference but the teacher itself.

Two ways, each over held-out prompts. Forced: every model reads the teacher's answer and tells at each of its
tokens what it would have written. Free: the teacher reads what a model wrote and tells how likely it is.
"""

from collections.abc import Mapping
from typing import Any

from distill_app.labeling.likelihood import Reading, answer_logits, passes, read_texts


def forced_agreement(
    teacher: Reading, others: Mapping[str, Reading], shared_vocabulary: int
) -> list[dict[str, dict[str, float]] | None]:
    """Return of each prompt how each model predicts the teacher's answer, beside how the teacher does.

    The answer's tokens are aligned from its end, since its first word can be cut into tokens otherwise after
    another prompt. Probabilities are over the first `shared_vocabulary` tokens; rows beyond them, with which
    output layers are padded, take no part.

    Returns:
        For each prompt and model `tokens`, `agreed` (places where both find the same token likeliest), `kl`
        (the sum of KL(teacher, model)) and `nats` (the answer's negative log-likelihood); the teacher among
        them. None where a text is too long for one of the models.
    """
    readings = {"teacher": teacher, **others}
    texts = {name: read_texts(reading) for name, reading in readings.items()}
    found: list[dict[str, dict[str, float]] | None] = [None] * len(teacher.prompts)
    for places in passes(readings, texts):
        logits = {
            name: list(answer_logits(reading.model, [texts[name][p] for p in places]))
            for name, reading in readings.items()
        }
        for at, place in enumerate(places):
            ours = texts["teacher"][place].answer
            found[place] = {
                name: _compared(
                    logits["teacher"][at], rows[at], ours, texts[name][place].answer, shared_vocabulary
                )
                for name, rows in logits.items()
            }
    return found


def _compared(
    teacher: Any, model: Any, teacher_answer: list[int], answer: list[int], vocabulary: int
) -> dict[str, float]:
    import torch

    if teacher_answer[-1] != answer[-1]:  # another end of sequence, as of a base model: no other answer
        teacher, model, teacher_answer, answer = teacher[:-1], model[:-1], teacher_answer[:-1], answer[:-1]
    shared = _common_tail(teacher_answer, answer)
    ours, theirs = teacher[len(teacher) - shared :, :vocabulary], model[len(model) - shared :, :vocabulary]
    with torch.inference_mode():
        agreed = (ours.argmax(-1) == theirs.argmax(-1).to(ours.device)).sum().item()
        ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1).to(ours.device)
        kl = (ours.exp() * (ours - theirs)).sum().item()
        target = torch.tensor(answer[len(answer) - shared :], device=theirs.device)
        nats = -theirs.gather(-1, target[:, None]).sum().item()
    return {"tokens": shared, "agreed": agreed, "kl": round(kl, 4), "nats": round(nats, 4)}


def _common_tail(first: list[int], second: list[int]) -> int:
    """Return how many tokens two answers share, counted from their ends."""
    shared = 0
    while shared < min(len(first), len(second)) and first[-1 - shared] == second[-1 - shared]:
        shared += 1
    return shared

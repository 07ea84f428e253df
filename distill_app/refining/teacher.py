"""A teacher whose distribution a student of another head, or another end of sequence, can be held against."""

from typing import Any

from distill_app.core.logits import tokenizer_digest
from distill_app.core.models import Model, Tokenizer

NEVER = -1e4  # the logit of a word that the teacher's output layer does not have


def require_shared_tokenizer(teacher: str, theirs: Tokenizer, student: str, ours: Tokenizer) -> None:
    """Make sure that a token means the same to both.

    Raises:
        ValueError: the tokenizers differ in more than what ends a sequence.
    """
    size = min(len(theirs), len(ours))
    if tokenizer_digest(theirs, size) != tokenizer_digest(ours, size):
        raise ValueError(
            f"{student}: its tokenizer is not that of its teacher {teacher}, and on-policy distillation"
            " compares them token by token; take a student of the teacher's family, or set steps: 0"
        )


def fit_head(teacher: Model, vocab_size: int, their_end: int | None, our_end: int) -> None:
    """Give the teacher an output layer over the student's words, in place.

    Families pad their output layers to different sizes (152,064 rows of Qwen2.5-7B, 151,936 of 0.5B): rows
    that the student lacks go, rows that the teacher lacks are never likely. Where the two end a sequence with
    different tokens, these change places, so that the teacher's wish to end falls on the student's token.

    Args:
        vocab_size: rows of the student's output layer.
        their_end, our_end: the token that ends a sequence of the teacher's and of the student's.
    """
    import torch

    head = teacher.get_output_embeddings()
    swaps = their_end is not None and their_end != our_end and max(their_end, our_end) < vocab_size
    if len(head.weight) == vocab_size and not swaps:
        return
    fitted = _padded(head, vocab_size)
    if swaps:
        order = torch.arange(vocab_size)
        order[[our_end, their_end]] = order[[their_end, our_end]]
        fitted.weight.data = fitted.weight.data[order]
        if fitted.bias is not None:
            fitted.bias.data = fitted.bias.data[order]
    teacher.set_output_embeddings(fitted)
    config: Any = teacher.config.get_text_config()
    config.tie_word_embeddings = False
    config.vocab_size = vocab_size


def _padded(head: Any, rows: int) -> Any:
    """Return a copy of an output layer with so many rows."""
    import torch

    had, width = head.weight.shape
    kept = min(had, rows)
    has_bias = head.bias is not None or rows > had
    fitted = torch.nn.Linear(width, rows, bias=has_bias, device=head.weight.device, dtype=head.weight.dtype)
    fitted.weight.data[:kept] = head.weight.data[:kept]
    fitted.weight.data[kept:] = 0
    if has_bias:
        fitted.bias.data[:kept] = head.bias.data[:kept] if head.bias is not None else 0
        fitted.bias.data[kept:] = NEVER
    return fitted.requires_grad_(False)

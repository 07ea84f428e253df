"""A student's reply to one prompt."""

from distill_app.core.models import Model, Tokenizer
from distill_app.core.prompts import Mode, format_prompt
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import generate


def infer_student(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    mode: Mode = "system1",
    max_new_tokens: int = 256,
) -> str:
    """Return the student's reply to `prompt`, likeliest token by token, without the prompt.

    The prompt is formatted by `format_prompt`, the text with which the student was trained.
    """
    text = format_prompt(prompt, mode=mode)
    return generate(model, tokenizer, [text], Sampling(max_new_tokens))[0].text

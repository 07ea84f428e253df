"""What student and teacher are asked, and the answer that is known, in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from distill_app.core.files import Record
from distill_app.core.models import Tokenizer
from distill_app.core.prompts import Mode, format_prompt, format_response, teacher_prompt


@dataclass(frozen=True)
class Prompt:
    """One record in tokens.

    Args:
        student, teacher: the prompt, in each one's own format.
        answer: the labelled answer as the student was trained to write it, with its end of sequence.
    """

    student: list[int]
    teacher: list[int]
    answer: list[int]


def build_prompts(
    records: Sequence[Record],
    student: Tokenizer,
    teacher: Tokenizer,
    mode: Mode,
    system_prompt: str | None,
    max_length: int,
) -> list[Prompt]:
    """Return the records in tokens, without those of which prompt and answer are longer than `max_length`."""
    found = []
    for record in records:
        asked = record["instruction"], record.get("input") or ""
        texts = format_prompt(*asked, mode), teacher_prompt(teacher, *asked, mode, system_prompt)
        ours, theirs, answer = (
            student(text, add_special_tokens=False)["input_ids"]
            for text in (*texts, format_response(record["output"]))
        )
        answer = [*answer, student.eos_token_id]
        if max(len(ours), len(theirs)) + len(answer) <= max_length:
            found.append(Prompt(ours, theirs, answer))
    return found


def bare_first_tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[int, int]:
    """Return, for each token that begins with a blank, the token of the same text without it.

    A student's answer begins with a blank after "Assistant:", a chat model's without one on a new line.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    places = {token: number for number, token in enumerate(tokens)}
    blanks = ("Ġ", "▁")  # as byte-level tokenizers and SentencePiece write it
    return {
        number: places[token[1:]]
        for token, number in places.items()
        if token and token[0] in blanks and token[1:] in places
    }

"""Training examples: the prompt's tokens without loss, the response's with it, end of sequence included."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from distill_app.core.files import Record
from distill_app.core.models import Tokenizer
from distill_app.core.prompts import chat_template, user_content

NO_LOSS = -100


@dataclass(frozen=True)
class Template:
    """How records become text, and the chat template that goes into the checkpoint (None: the student's)."""

    source: str
    chat_template: str | None

    def render(self, record: Record) -> tuple[str, str]:
        """Return prompt and response of a record.

        Raises:
            ValueError: the rendered text with the answer does not begin with the rendered prompt.
        """
        try:
            template = jinja2.Environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as err:
            raise ValueError(
                f"dataset.template: line {err.lineno}: {err.message}; mend the template"
            ) from err
        content = user_content(record["instruction"], record["input"])
        prompt = template.render(
            message={"role": "user", "content": content},
            add_generation_prompt=True,
            add_output=False,
        )
        text = template.render(
            message={"content": content, "output": record["output"]},
            add_generation_prompt=False,
            add_output=True,
        )
        if not text.startswith(prompt):
            raise ValueError(
                f"dataset.template: the training text {text[:60]!r} does not begin with the prompt"
                f" {prompt[:60]!r}; make both renderings share their head"
            )
        return prompt, text[len(prompt) :]


def read_template(path: str | None) -> Template:
    """Return the template of a config; without one, ours for System 1."""
    if not path:
        return Template(chat_template("system1"), chat_template("system1"))
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset.template: {path}: no such file; mend the path")
    source = Path(path).read_text(encoding="utf-8")
    return Template(source, source if "messages" in source else None)


def build_examples(
    records: Sequence[Record], tokenizer: Tokenizer, template: Template, max_length: int | None
) -> tuple[list[dict[str, list[int]]], int]:
    """Return `{input_ids, labels}` of each record, and how many were left out as over `max_length` tokens.

    An example is never cut: a student trained on the head of an answer would learn to stop early.
    """
    examples = []
    for record in records:
        prompt, response = template.render(record)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if max_length is None or len(head) + len(tail) <= max_length:
            labels = [NO_LOSS] * len(head) + tail
            examples.append({"input_ids": head + tail, "labels": labels})
    return examples, len(records) - len(examples)

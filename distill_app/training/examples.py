"""Training examples: the prompt's tokens without loss, the response's with it, end of sequence included."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import jinja2

from distill_app.core.files import Record
from distill_app.core.logits import TopLogits
from distill_app.core.models import Tokenizer
from distill_app.core.prompts import chat_template, user_content
from distill_app.core.texts import normalise

NO_LOSS = -100
UNLIKE_TOKENS = 16  # of an answer's first word, at most


@dataclass(frozen=True)
class Template:
    """How records become text, and the chat template that goes into the checkpoint (None: the student's)."""

    source: str
    chat_template: str | None

    @cached_property
    def compiled(self) -> jinja2.Template:
        """The source, compiled.

        Raises:
            ValueError: it is no Jinja.
        """
        try:
            return jinja2.Environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as err:
            raise ValueError(f"dataset.template: line {err.lineno}: {err.message}; fix the template") from err

    def render(self, record: Record, eos_token: str = "") -> tuple[str, str]:
        """Return prompt and response of a record.

        The prompt is the one that is rendered to ask with: only what a model was trained behind does it meet
        again. EasyDistill 1.0's own template renders another white space before the answer where it renders
        the answer too; what follows there is the response all the same.

        Args:
            eos_token: where the template ends the answer with it, the response ends before it.

        Raises:
            ValueError: the two renderings differ in more than white space where the answer begins.
        """
        content = user_content(record["instruction"], record["input"])
        prompt = self.compiled.render(
            message={"role": "user", "content": content},
            add_generation_prompt=True,
            add_output=False,
        )
        text = self.compiled.render(
            message={"content": content, "output": record["output"]},
            add_generation_prompt=False,
            add_output=True,
        )
        response = _behind(prompt, text)
        if response is None:
            raise ValueError(
                f"dataset.template: the training text {text[:60]!r} does not begin with the prompt"
                f" {prompt[:60]!r}; make both renderings share their head"
            )
        answer_end = response.rfind(record["output"].strip()) + len(record["output"].strip())
        end = response.find(eos_token, answer_end) if eos_token else -1
        return prompt, response if end < 0 else response[:end]


def _behind(prompt: str, text: str) -> str | None:
    """Return what follows the prompt in a text with other white space in one place at most, else None."""
    shared = len(os.path.commonprefix([prompt, text]))
    begun = prompt[shared:].lstrip()
    rest = text[shared:]
    if shared < len(prompt):
        rest = rest.lstrip()
    return rest[len(begun) :] if rest.startswith(begun) else None


def read_template(path: str | None) -> Template:
    """Return the template of a config; without one, ours for System 1."""
    if not path:
        return Template(chat_template("system1"), chat_template("system1"))
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset.template: {path}: no such file; fix the path")
    source = Path(path).read_text(encoding="utf-8")
    return Template(source, source if "messages" in source else None)


@dataclass(frozen=True)
class Example:
    """One record in tokens.

    Args:
        labels: as long as `input_ids`; NO_LOSS where nothing is learned. The label of a token is the token
            itself: the shift to the state before it is the loss's.
        row: of the record in its file, and so of the teacher's distributions.
        known: how many of the response's tokens, one after the other, have a distribution of the teacher's.
        offset: of the first of those within the row's distributions.
        unknown_end: tokens behind them, at the response's end, that have none: 1 where the teacher ends a
            sequence with another token, else 0.
    """

    input_ids: list[int]
    labels: list[int]
    row: int
    known: int = 0
    offset: int = 0
    unknown_end: int = 0


@dataclass
class Examples:
    """What is trained on and what is held out of it to choose a checkpoint by; how many were too long."""

    train: list[Example]
    validation: list[Example]
    dropped: int = 0
    cut: int = 0

    def counts(self) -> dict[str, int]:
        """Return the counts that a checkpoint's provenance holds."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "too_long_dropped": self.dropped,
            "too_long_cut": self.cut,
        }


def build_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    max_length: int | None = None,
    cut_too_long: bool = False,
    response_only: bool = True,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Examples:
    """Return the records in tokens, those held out for validation apart.

    Args:
        max_length: tokens of prompt and response; a longer example is dropped, since a student trained on
            the head of an answer may learn to stop early.
        cut_too_long: cut it instead, and its end of sequence with it, which is then not learned.
        response_only: False learns the prompt's tokens too.
        validation_fraction: of the instructions; a hash of the text and the seed decides, so that
            duplicates fall on one side.
    """
    found = Examples([], [])
    for row, record in enumerate(records):
        prompt, response = template.render(record, tokenizer.eos_token)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = head + tail
        labels = [NO_LOSS] * len(head) + tail if response_only else list(ids)
        labels[0] = NO_LOSS  # nothing comes before the first token that could predict it
        if max_length is not None and len(ids) > max_length:
            if not cut_too_long or len(head) >= max_length:
                found.dropped += 1
                continue
            ids, labels = ids[:max_length], labels[:max_length]
            found.cut += 1
        held_out = is_held_out(record, validation_fraction, seed)
        (found.validation if held_out else found.train).append(Example(ids, labels, row))
    return found


def is_held_out(record: Record, validation_fraction: float, seed: int) -> bool:
    """Tell whether training validates by a record; all records of one question are on the same side."""
    return validation_fraction > 0 and _place(record, seed) < validation_fraction


def _place(record: Record, seed: int) -> float:
    """Return a number from 0 to 1 that the record's question decides."""
    text = normalise(user_content(record["instruction"], record["input"]))
    digest = hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def with_teacher(
    examples: Sequence[Example], logits: TopLogits, tokenizer: Tokenizer, count: int
) -> list[Example]:
    """Return the examples with the place of each response among the teacher's distributions.

    The teacher's prompt may end otherwise than the student's ("Assistant:" wants a blank before the answer),
    so the two may cut the first word into other tokens; from there on they are the same. The teacher may end
    a sequence with another token, as a chat model does beside its base model: then the student's has no
    distribution.

    Args:
        count: records in the labelled file.

    Raises:
        ValueError: the distributions belong to other records; the record's number, from 0.
    """
    if len(logits) != count:
        raise ValueError(
            f"{logits.path}: found the teacher's distributions of {len(logits)} records, expected {count};"
            " run the stage that writes them again"
        )
    return [_aligned(example, logits, tokenizer) for example in examples]


def _aligned(example: Example, logits: TopLogits, tokenizer: Tokenizer) -> Example:
    *theirs, their_end = logits[example.row].tokens.tolist()
    start = next(n for n, label in enumerate(example.labels) if label != NO_LOSS)
    ours = example.input_ids[start:]
    is_whole = ours[-1] == tokenizer.eos_token_id  # a response that was cut has lost its end
    if is_whole:
        ours = ours[:-1]
    shares_end = is_whole and their_end == tokenizer.eos_token_id
    found, expected = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (theirs, ours))
    # Half of a letter may be cut off too
    if found == expected or (not is_whole and found.startswith(expected.rstrip("\ufffd"))):
        for skipped, offset in product(range(UNLIKE_TOKENS), repeat=2):
            rest = ours[skipped:]
            if rest == (theirs[offset:] if is_whole else theirs[offset : offset + len(rest)]):
                place = {"known": len(rest) + shares_end, "offset": offset}
                return replace(example, **place, unknown_end=int(is_whole and not shares_end))
    raise ValueError(
        f"{logits.path}: record {example.row}: found the teacher's distributions of another answer,"
        f" {found[:40]!r}, expected {expected[:40]!r}; run the stage that writes them again"
    )

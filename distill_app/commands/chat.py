"""`distill chat`: a conversation with one model, or with several that get the same questions."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from distill_app.commands.asking import (
    add_sampling_arguments,
    check_chat_template,
    sampling_of,
    utf8,
    visible,
)
from distill_app.evaluation.names import MODELS
from distill_app.generation.answers import Sampling

if TYPE_CHECKING:
    from rich.console import Console

    from distill_app.commands.conversation import Conversation, Reply
    from distill_app.evaluation.candidates import Candidate

HELP = "talk with a model, or with several at once"
COMMANDS = """\
/reset  forget what was said
/help   show this
/quit   leave, as Ctrl-D does
Ctrl-C stops an answer. The arrow keys bring back and edit what was asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="checkpoint folder or Hub id, e.g. models/system1; several all answer each question",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="ask the teacher, and each student before and after distillation, as params.yaml names them",
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Answer what is typed, or each line that is piped in, until the input ends."""
    from rich.console import Console

    if not args.models and not args.compare:
        raise ValueError("chat: found no model, expected one or --compare; try distill chat models/system1")
    sampling = sampling_of(args)
    talks = _conversations(args)
    console = Console(highlight=False, soft_wrap=True)
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        print(f"{', '.join(talks)}\n/help shows what you can do\n")

    def heed(line: str) -> bool:
        """Do what a line says; tell whether the chat goes on."""
        question = line.strip()
        if question == "/reset":
            for talk in talks.values():
                talk.reset()
            print("(forgotten)", file=sys.stderr)
        elif question == "/help":
            print(COMMANDS)
        elif question.startswith("/") and len(question.split()) == 1 and question != "/quit":
            print(f"{visible(question)}: no such command; there are /reset, /help and /quit", file=sys.stderr)
        elif question and question != "/quit":
            _answer_all(talks, question, sampling, console, typed)
        return question != "/quit"

    if typed:
        _heed_typed_lines(heed)
    else:
        all(heed(line) for line in sys.stdin)


def _heed_typed_lines(heed: Callable[[str], bool]) -> None:
    """Read lines until the chat ends, as with Ctrl-D; Ctrl-C throws away the line, or stops its answer."""
    import readline  # noqa: F401  # gives `input` history and editing

    goes_on = True
    while goes_on:
        note = "(Ctrl-D or /quit leaves)"
        try:
            line = input("> ")
            note = "(stopped)"
            goes_on = heed(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the line, or before the first token; later ones end in a reply
            print(f"\n{note}", file=sys.stderr)


def _conversations(args: argparse.Namespace) -> dict[str, "Conversation"]:
    from distill_app.commands.conversation import Conversation
    from distill_app.core.models import load_student, load_teacher
    from distill_app.core.prompts import chat_template

    talks = {}
    for candidate in _compared() if args.compare else ():
        model, tokenizer = load_teacher(candidate.model, candidate.quantization, candidate.revision)
        if candidate.mode is not None or not tokenizer.chat_template:  # as the comparison asks it
            tokenizer.chat_template = chat_template(candidate.mode or "system1")
        talks[MODELS[candidate.name]] = Conversation(model, tokenizer)
    for path in dict.fromkeys(args.models):
        model, tokenizer = load_student(path)
        check_chat_template(path, tokenizer)
        talks[path] = Conversation(model, tokenizer)
    return talks


def _compared() -> Sequence["Candidate"]:
    """Return the models of the comparison, as its stage names them."""
    from distill_app.core.params import read_section
    from distill_app.easydistill.params import TrainParams
    from distill_app.evaluation.asking.params import MeasureParams
    from distill_app.evaluation.candidates import compared_models
    from distill_app.labeling.params import LabelParams

    before1 = read_section("train_s1", TrainParams)
    before2 = read_section("train_s2", TrainParams)
    return compared_models(
        read_section("label", LabelParams),
        read_section("measure", MeasureParams),
        system1_before=before1.student,
        system2_before=before2.student,
        models_dir="models",
        system1_revision=before1.revision,
        system2_revision=before2.revision,
    )


def _answer_all(
    talks: dict[str, "Conversation"], question: str, sampling: Sampling, console: "Console", typed: bool
) -> None:
    """Print each model's answer as it is written, under its name where there are several."""
    from rich.text import Text

    for name, talk in talks.items():
        if len(talks) > 1:
            console.print(Text(name, style="bold"))
        try:
            reply = talk.ask(utf8(question), sampling, _write)
        except ValueError as err:
            if not typed:
                raise
            print(f"error: {err}", file=sys.stderr)
            continue
        print(flush=True)
        if reply.finish == "interrupted" and not typed:
            raise KeyboardInterrupt
        for note in _notes(reply):
            print(note, file=sys.stderr)
        if len(talks) > 1:
            console.print(Text(f"{reply.tokens} tokens, {reply.tokens_per_sec:.1f} tokens/s", style="dim"))
        print(flush=True)


def _write(text: str) -> None:
    print(visible(text), end="", flush=True)


def _notes(reply: "Reply") -> Iterator[str]:
    if reply.forgotten:
        yield f"(no room for the whole conversation: {reply.forgotten} of its oldest turns forgotten)"
    if reply.finish == "length":
        yield f"(cut at {reply.tokens} tokens)"
    if reply.finish == "interrupted":
        yield "(stopped)"

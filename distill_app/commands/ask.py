"""`distill ask`: one question from the shell or a pipe."""

import argparse
import sys

from distill_app.commands.asking import (
    add_sampling_arguments,
    check_chat_template,
    sampling_of,
    utf8,
    visible,
)

HELP = "ask a model one question"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub id, e.g. models/system2")
    parser.add_argument(
        "question",
        metavar="QUESTION",
        nargs="?",
        help='the question; without it, or with "-", standard input',
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the answer; that it was cut goes to standard error."""
    from distill_app.core.models import load_student
    from distill_app.generation.batch import generate

    piped = args.question == "-" or (args.question is None and not sys.stdin.isatty())
    question = sys.stdin.read() if piped else args.question
    if not question or not question.strip():
        raise ValueError("question: found nothing, expected text; write it after the model")
    question, sampling = utf8(question.strip()), sampling_of(args)
    model, tokenizer = load_student(args.model)
    check_chat_template(args.model, tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    answer = generate(model, tokenizer, [prompt], sampling)[0]
    if answer.finish_reason == "refused":
        raise ValueError(
            f"question: found {answer.prompt_tokens} tokens, too many for {args.model}; ask a shorter one"
        )
    print(visible(answer.text))
    if answer.finish_reason == "length":
        print(f"(cut at {args.max_new_tokens} tokens)", file=sys.stderr)

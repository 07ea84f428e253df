"""The one place that knows the prompt's words.

A prompt is a few labelled lines that end where the answer begins:

    User: How many legs have three cats?
    Think step by step.
    Assistant:

`chat_template.jinja` beside this file says the same for servers and for EasyDistill; a test holds the
two equal.
"""

from pathlib import Path
from typing import Literal, get_args

Mode = Literal["system1", "system2"]

COT_INSTRUCTION = "Think step by step."
ASSISTANT = "Assistant:"


def format_prompt(instruction: str, input_text: str = "", mode: Mode = "system1") -> str:
    """Return the text a student is asked with; its answer follows after one space."""
    lines = [f"User: {user_content(instruction, input_text)}"]
    if _checked(mode) == "system2":
        lines.append(COT_INSTRUCTION)
    return "\n".join([*lines, ASSISTANT])


def user_content(instruction: str, input_text: str = "") -> str:
    """Return instruction and input as one user message, as chat clients send it."""
    instruction, input_text = instruction.strip(), input_text.strip()
    return f"{instruction}\nInput: {input_text}" if input_text else instruction


def format_response(output: str) -> str:
    """Return an answer as it stands after the prompt, without the end-of-sequence token."""
    return f" {output.strip()}"


def chat_template(mode: Mode) -> str:
    """Return the Jinja chat template of a student: `messages` as servers pass them, or EasyDistill's
    `message` with `add_output`."""
    source = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    cot = COT_INSTRUCTION if _checked(mode) == "system2" else ""
    return source.replace("COT_INSTRUCTION", cot).strip()


def teacher_prompt(
    tokenizer: object, instruction: str, input_text: str, mode: Mode, system_prompt: str | None = None
) -> str:
    """Return the text a teacher is asked with: its own chat template where it has one.

    Raises:
        ValueError: the template takes no system prompt.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        prompt = format_prompt(instruction, input_text, mode)
        return f"{system_prompt}\n{prompt}" if system_prompt else prompt
    messages = teacher_messages(instruction, input_text, mode, system_prompt)
    try:
        return tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as err:
        if not system_prompt:
            raise
        raise ValueError(
            f"label.system_prompt: the teacher's chat template takes none ({err}); set it to null, or write"
            " it into the instructions"
        ) from err


def teacher_messages(
    instruction: str, input_text: str, mode: Mode, system_prompt: str | None = None
) -> list[dict[str, str]]:
    """Return what a teacher is asked with as chat messages, `{role, content}`."""
    content = user_content(instruction, input_text)
    if _checked(mode) == "system2":
        content = f"{content}\n{COT_INSTRUCTION}"
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": content}]


def _checked(mode: str) -> str:
    if mode not in get_args(Mode):
        raise ValueError(f'mode: found "{mode}", expected "system1" or "system2"')
    return mode

import jinja2
import pytest

from distill_app import format_prompt
from distill_app.core.prompts import chat_template, teacher_prompt, user_content


def test_a_system1_prompt_is_user_and_assistant():
    assert format_prompt("Say hi.") == "User: Say hi.\nAssistant:"


def test_input_and_chain_of_thought_stand_between_user_and_assistant():
    prompt = format_prompt("Add.", "2 and 3", mode="system2")
    assert prompt == "User: Add.\nInput: 2 and 3\nThink step by step.\nAssistant:"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match='mode: found "system3"'):
        format_prompt("x", mode="system3")


@pytest.mark.parametrize("mode", ["system1", "system2"])
@pytest.mark.parametrize("text", ["Say hi.", "two\nlines", "{{ braces }} {% raw %}", "ünï 漢字 <b>"])
def test_a_chat_server_and_format_prompt_render_the_same(tiny, mode, text):
    tokenizer = tiny[1]
    messages = [{"role": "user", "content": user_content(text, "more")}]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=chat_template(mode)
    )
    assert rendered == format_prompt(text, "more", mode)


def test_a_finished_turn_ends_with_eos_and_the_next_begins_on_a_new_line(tiny):
    tokenizer = tiny[1]
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=chat_template("system1")
    )
    assert rendered == "User: One?\nAssistant: Two.</s>\nUser: Three?\nAssistant:"


@pytest.mark.parametrize("mode", ["system1", "system2"])
def test_easydistill_renders_prompt_and_training_text_as_ours(mode):
    template = jinja2.Environment().from_string(chat_template(mode))
    prompt = template.render(
        message={"role": "user", "content": "Add."}, add_generation_prompt=True, add_output=False
    )
    text = template.render(
        message={"content": "Add.", "output": "Five."}, add_generation_prompt=False, add_output=True
    )
    assert prompt == format_prompt("Add.", mode=mode)
    assert text == prompt + " Five."


def test_a_teacher_with_a_chat_template_is_asked_in_it(tiny):
    tokenizer = tiny[1]
    prompt = teacher_prompt(tokenizer, "Add.", "2 and 3", "system2")
    assert prompt == "<s>user\nAdd.\nInput: 2 and 3\nThink step by step.</s>\n<s>assistant\n"


def test_a_teacher_without_one_is_asked_in_ours():
    assert teacher_prompt(object(), "Add.", "", "system1") == format_prompt("Add.")

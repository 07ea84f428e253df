"""Conversations: what is shown, what is remembered, and what the keys do."""

import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from commandline import COMMAND, Terminal, distill, distill_here, heed_interrupts
from conftest import ROOT, make_tiny_model

from distill_app.commands.asking import visible
from distill_app.commands.conversation import Conversation
from distill_app.core.models import load_student, set_chat_template
from distill_app.core.prompts import chat_template, format_prompt
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import stop_tokens

EIGHT = Sampling(8)


@pytest.fixture
def talk(tiny_model_dir) -> Conversation:
    return Conversation(*load_student(str(tiny_model_dir)))


def heard(talk: Conversation, question: str, sampling: Sampling = EIGHT) -> tuple[str, object]:
    """Return what was written piece by piece, joined, and the reply."""
    pieces: list[str] = []
    reply = talk.ask(question, sampling, pieces.append)
    return "".join(pieces), reply


def likeliest(talk: Conversation, text: str, count: int) -> str:
    """Return the greedy answer to a rendered prompt, by the whole text at each token."""
    ids = talk.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, talk.model(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == talk.tokenizer.eos_token_id:
                break
    return talk.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_an_answer_is_the_likeliest_one_and_knows_what_was_said_before(talk):
    talk.model.float()  # in bfloat16 two scores can be equal
    talk.tokenizer.chat_template = chat_template("system1")
    first, reply = heard(talk, "Name three.")
    assert first == reply.text == likeliest(talk, format_prompt("Name three."), 8) != ""
    second, _ = heard(talk, "And one more?")
    before = f"{format_prompt('Name three.')} {first}</s>\n"
    assert second == likeliest(talk, before + format_prompt("And one more?"), 8)
    talk.reset()
    assert heard(talk, "And one more?")[0] == likeliest(talk, format_prompt("And one more?"), 8)


def test_words_are_shown_before_the_answer_is_whole(talk):
    seen = []
    forward = talk.model.forward
    talk.model.forward = lambda *args, **kwargs: (seen.append("pass"), forward(*args, **kwargs))[1]
    talk.ask("Tell me.", Sampling(64), lambda word: seen.append("word"))
    assert "word" in seen[: len(seen) - 1 - seen[::-1].index("pass")]


def test_a_checkpoint_that_asks_for_sampling_is_asked_greedily(talk, tiny_copy):
    (tiny_copy / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 3.0, "top_k": 2, "eos_token_id": [2, 300]}'
    )
    other = Conversation(*load_student(str(tiny_copy)))
    assert stop_tokens(other.model, other.tokenizer) == {2, 300}
    assert heard(other, "Tell me.")[0] == heard(talk, "Tell me.")[0]


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(talk):
    def drawn(seed: int) -> str:
        fresh = Conversation(talk.model, talk.tokenizer)
        return heard(fresh, "Tell me.", Sampling(16, temperature=1.5, seed=seed))[0]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_temperature_draws_from_the_whole_vocabulary(talk):
    """transformers' own default looks at 50 tokens."""
    with torch.inference_mode():
        talk.model.lm_head.weight.zero_()
    reply = heard(talk, "Tell me.", Sampling(400, temperature=1.0))[1]
    assert len(set(talk.tokenizer(reply.text)["input_ids"])) > 60


def test_the_oldest_turns_are_forgotten_where_the_model_has_no_room(talk):
    talk.longest = 120
    for number in range(6):
        reply = heard(talk, f"Number {number}?")[1]
    assert reply.forgotten == 1 and 1 < len(talk.turns) < 6
    assert talk.turns[-1][0] == "Number 5?"
    with pytest.raises(
        ValueError, match="question: found .* tokens, expected fewer than 120, the model's pos"
    ):
        heard(talk, "word " * 30)
    assert talk.turns[-1][0] == "Number 5?"


def test_an_answer_ends_where_the_models_positions_end(talk):
    asked = len(talk.tokenizer.apply_chat_template([{"role": "user", "content": "Hello?"}])["input_ids"])
    talk.longest = asked + 12  # and "assistant"
    reply = heard(talk, "Hello?", Sampling(256, stop_at_eos=False))[1]
    assert 0 < reply.tokens < 12 and reply.finish == "length"


@pytest.mark.parametrize("passes", [1, 12])
def test_a_stopped_answer_counts_as_said_as_far_as_it_went(talk, passes):
    forward, done = talk.model.forward, []

    def interrupted(*args, **kwargs):
        done.append(1)
        if len(done) == passes:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    talk.model.forward = interrupted
    text, reply = heard(talk, "Tell me.", Sampling(64))
    assert reply.finish == "interrupted" and reply.text == text and reply.tokens == passes - 1
    assert talk.turns == ([("Tell me.", text)] if text else [])
    assert bool(text) == (passes > 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext, ümläuts, 中文, 😶‍🌫️", "plain\n\ttext, ümläuts, 中文, 😶‍🌫️"),
        ("\x1b[2J\x1b]0;title\x07", "␛[2J␛]0;title␇"),
        ("a\rb\x08\x7f\x9b31m", "a␍b␈␡\ufffd31m"),
        ("safe\u202egnp.exe\u2066", "safe\ufffdgnp.exe\ufffd"),
        ("\ud800", "\ufffd"),
    ],
)
def test_an_answer_can_do_nothing_to_the_terminal(text, shown):
    assert visible(text) == shown


@pytest.fixture
def hostile(tiny_copy) -> Path:
    """A model whose every token is ESC."""
    model, tokenizer = load_student(str(tiny_copy))
    esc = tokenizer("\x1b")["input_ids"][0]
    with torch.inference_mode():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        for weight in (model.lm_head.weight[esc], model.model.norm.weight):
            weight += 1
        model.model.embed_tokens.weight.fill_(1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(tiny_copy)
    return tiny_copy


@pytest.mark.parametrize("verb", ["ask", "chat"])
def test_a_model_that_writes_escape_sequences_shows_them_as_text(hostile, verb):
    run = distill_here(verb, str(hostile), "--max-new-tokens", "3", stdin="Hello?\n")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "␛␛␛"


@pytest.mark.parametrize("verb", ["ask", "chat"])
def test_a_question_that_is_not_utf_8_is_an_error_in_one_line(tiny_model_dir, verb):
    run = distill_here(verb, str(tiny_model_dir), stdin="caf\udce9\n")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: question: character 3 is not UTF-8; type or save it as UTF-8\n"


@pytest.mark.parametrize("verb", ["ask", "chat"])
def test_a_question_too_long_for_the_model_is_an_error_in_one_line(tiny_model_dir, verb):
    run = distill_here(verb, str(tiny_model_dir), stdin="word " * 9000)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: question: found ") and run.stderr.endswith("ask a shorter one\n")


@pytest.mark.slow
def test_a_question_is_answered_from_the_shell_and_from_a_pipe(tiny_model_dir):
    model = str(tiny_model_dir)
    runs = [
        distill("ask", model, "Name three.", "--max-new-tokens", "4"),
        distill_here("ask", model, "-", "--max-new-tokens", "4", stdin="Name three.\n"),
        distill_here("ask", model, "--max-new-tokens", "4", stdin="Name three.\n"),
    ]
    assert [run.returncode for run in runs] == [0, 0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout != ""
    assert runs[0].stderr == "(cut at 4 tokens)\n"


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_error(tiny_model_dir):
    pipe = f"yes /help | {shlex.join([*COMMAND, 'chat', str(tiny_model_dir)])} | head -1"
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {pipe}; echo ${{PIPESTATUS[1]}}"], capture_output=True, text=True
    )
    assert run.stdout == "/reset  forget what was said\n0\n" and run.stderr == ""


def test_piped_lines_are_answered_in_plain_text(tiny_model_dir):
    lines = "Name three.\n\n  \n/reset\n/forget\nName three.\nAnd more?"
    run = distill_here("chat", str(tiny_model_dir), "--max-new-tokens", "6", stdin=lines)
    assert run.returncode == 0, run.stderr
    first, second, third, _ = run.stdout.split("\n\n")
    assert first == second != third != ""
    assert "/forget: no such command; there are /reset, /help and /quit" in run.stderr
    assert "\x1b" not in run.stdout + run.stderr
    quit_early = distill_here("chat", str(tiny_model_dir), stdin="/quit\nHello?\n")
    assert (quit_early.returncode, quit_early.stdout) == (0, "")


def test_a_model_without_a_chat_template_is_refused(tiny_copy):
    set_chat_template(tiny_copy, "")
    run = distill_here("chat", str(tiny_copy), stdin="Hello?")
    assert run.returncode == 1
    assert run.stderr.endswith("no chat template in it; ask a distilled or instruct model\n")


def test_several_models_answer_under_their_names_with_their_speed(tiny_model_dir, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=5)
    alone = distill_here("chat", str(other), "--max-new-tokens", "6", stdin="Hello?\n").stdout
    both = distill_here("chat", str(tiny_model_dir), str(other), "--max-new-tokens", "6", stdin="Hello?\n")
    assert both.returncode == 0, both.stderr
    first, second, _ = both.stdout.split("\n\n")
    assert first.startswith(f"{tiny_model_dir}\n") and "tokens, " in first and first.endswith(" tokens/s")
    assert second.startswith(f"{other}\n{alone.strip()}\n")


def test_compare_asks_the_compared_models_of_the_params(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["label"]["teacher"] = "models/base/teacher"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    for place in ("base/teacher", "base/system1", "base/system2", "system1", "system2"):
        shutil.copytree(tiny_model_dir, tmp_path / "models" / place)
    for system in ("system1", "system2"):
        set_chat_template(tmp_path / "models" / system, chat_template(system))  # as training leaves it
    run = distill_here("chat", "--compare", "--max-new-tokens", "6", stdin="Hello?\n")
    assert run.returncode == 0, run.stderr
    parts = [part.partition("\n") for part in run.stdout.strip().split("\n\n")]
    assert [name for name, _, _ in parts] == [
        "Teacher",
        "System 1 before",
        "System 1",
        "System 2 before",
        "System 2",
    ]
    answers = [answer.rpartition("\n")[0] for _, _, answer in parts]
    # All have the same weights: what differs is how they are asked
    assert answers[0] == answers[1] == answers[3] and len(set(answers)) == 3
    shutil.rmtree(tmp_path / "models/system2")
    lost = distill_here("chat", "--compare")
    assert lost.returncode == 1 and "models/system2: no such model folder" in lost.stderr


@pytest.fixture
def endless(tiny_copy) -> Path:
    """A model that never ends its answer by itself."""
    model, _ = load_student(str(tiny_copy))
    with torch.inference_mode():
        model.lm_head.weight[2] = 0  # so that some other token always scores higher
    model.save_pretrained(tiny_copy)
    return tiny_copy


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_ctrl_d_the_chat_and_arrows_bring_back_what_was_asked(endless):
    terminal = Terminal("chat", str(endless), "--max-new-tokens", "1800")
    terminal.until("/help shows")
    terminal.until("> ")
    terminal.type("Tell me everything.\n")
    terminal.until("everything.\r\n.")
    terminal.type("\x03")
    terminal.until(r"\(stopped\)")
    terminal.until("> ")
    terminal.type("Tell me.\n")
    terminal.until("Tell me\\.\r\n")
    terminal.type("\x03")  # wherever that meets it, before the first word or after
    terminal.until("> ")
    terminal.type("a line thrown away")
    terminal.until("thrown away")
    terminal.type("\x03")
    time.sleep(0.5)
    terminal.type("\n")  # a signal that came just before Python's input waited is heard with the line's end
    terminal.until("Ctrl-D or /quit leaves")
    terminal.type("/reset\n")
    terminal.until("forgotten")
    terminal.type("\x10" * 4)  # as arrow up, to the first line of all
    terminal.until(r"everything\.")  # readline draws what differs from the line before
    terminal.type("\x15\x04")  # the line's removal, and Ctrl-D
    assert terminal.exit_code() == 0


@pytest.mark.slow
def test_ctrl_c_ends_a_run_in_a_pipe(endless):
    command = [*COMMAND, "chat", str(endless), "--max-new-tokens", "1800"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as run:
        run.stdin.write("Tell me everything.\nAnd the rest.\n")
        run.stdin.flush()
        run.stdout.read(10)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate()
    assert run.returncode == 130 and "interrupted" in errors


def test_ask_and_chat_give_the_same_answer_to_the_same_question(tiny_model_dir):
    for flags in ([], ["--temperature", "1.3", "--seed", "7"]):
        arguments = [str(tiny_model_dir), "--max-new-tokens", "12", *flags]
        asked = distill_here("ask", arguments[0], "Tell me.", *arguments[1:])
        talked = distill_here("chat", *arguments, stdin="Tell me.\n")
        assert asked.returncode == talked.returncode == 0, asked.stderr + talked.stderr
        assert asked.stdout.strip() == talked.stdout.strip() != ""


def test_a_question_asked_again_after_a_reset_draws_another_answer_and_the_session_repeats(tiny_model_dir):
    arguments = [str(tiny_model_dir), "--max-new-tokens", "12", "--temperature", "1.5", "--seed", "7"]
    said = "Tell me.\n/reset\nTell me.\n/reset\nTell me.\n"
    first, again = (distill_here("chat", *arguments, stdin=said) for _ in range(2))
    answers = first.stdout.strip().split("\n\n")
    assert len(answers) == len(set(answers)) == 3
    assert again.stdout == first.stdout

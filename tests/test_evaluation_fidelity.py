"""How near a model is to its teacher, against a plain reference in float64."""

import copy

import pytest
import torch
from conftest import make_tiny_model

from distill_app import load_student
from distill_app.evaluation.asking.fidelity import forced_agreement
from distill_app.labeling.likelihood import Reading, answer_nats

PROMPTS = ["User: Name a fruit.\nAssistant:", "User: Say 1.\nAssistant:", "User: What is it?\nAssistant:"]
ANSWERS = [" An apple is red.", " 1", " It is the quick brown fox that jumps."]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load_student(str(make_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=7)))


def reference(model, tokenizer, prompt: str, answer: str):
    """Return the log-probabilities at the answer's tokens, `(tokens, vocab)` in float64, and the tokens."""
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = model(torch.tensor([head + tail])).logits[0].double()
    return logits[len(head) - 1 : -1].log_softmax(-1), tail


def test_agreement_divergence_and_loss_are_those_of_a_plain_reference(tiny, other):
    readings = [Reading(*pair, PROMPTS, ANSWERS) for pair in (tiny, other)]
    found = forced_agreement(readings[0], {"other": readings[1]}, 400)
    for prompt, answer, row in zip(PROMPTS, ANSWERS, found, strict=True):
        teacher, tail = reference(*tiny, prompt, answer)
        student, _ = reference(*other, prompt, answer)
        assert row["other"]["tokens"] == len(tail)
        assert row["other"]["agreed"] == (teacher.argmax(-1) == student.argmax(-1)).sum()
        kl = (teacher.exp() * (teacher - student)).sum().item()
        assert row["other"]["kl"] == pytest.approx(kl, rel=0.02, abs=0.02)
        nats = -student[range(len(tail)), tail].sum().item()
        assert row["other"]["nats"] == pytest.approx(nats, rel=0.02, abs=0.02)


def test_a_teacher_agrees_with_itself_everywhere_and_differs_by_nothing(tiny):
    reading = Reading(*tiny, PROMPTS, ANSWERS)
    for row in forced_agreement(reading, {"again": reading}, 400):
        assert row["again"]["agreed"] == row["again"]["tokens"] and row["again"]["kl"] == 0


def test_an_answer_that_another_prompt_cuts_otherwise_is_aligned_from_its_end(tiny):
    spaced = Reading(*tiny, PROMPTS, ANSWERS)
    bare = Reading(*tiny, [prompt + "\n" for prompt in PROMPTS], [answer.strip() for answer in ANSWERS])
    for row, answer in zip(forced_agreement(bare, {"spaced": spaced}, 400), ANSWERS, strict=True):
        tokens = len(tiny[1](answer, add_special_tokens=False)["input_ids"]) + 1
        assert tokens - 3 <= row["spaced"]["tokens"] <= tokens


def test_a_model_that_ends_a_sequence_with_another_token_is_compared_up_to_it(tiny, other):
    model, tokenizer = other
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<s>"
    teacher, student = Reading(*tiny, PROMPTS, ANSWERS), Reading(*other, PROMPTS, ANSWERS)
    base = Reading(model, tokenizer, PROMPTS, ANSWERS)
    found = forced_agreement(teacher, {"student": student, "base": base}, 400)
    for row, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        assert row["base"]["tokens"] == row["student"]["tokens"] - 1 > 0
        logs, tail = (part[:-1] for part in reference(*other, prompt, answer))
        nats = -logs[range(len(tail)), tail].sum().item()
        assert row["base"]["nats"] == pytest.approx(nats, rel=0.02, abs=0.02)


def test_rows_beyond_the_shared_vocabulary_take_no_part(tiny, other):
    readings = [Reading(*pair, PROMPTS, ANSWERS) for pair in (tiny, other)]
    whole, cut = (forced_agreement(readings[0], {"other": readings[1]}, size) for size in (400, 385))
    assert [row["other"]["kl"] for row in whole] != [row["other"]["kl"] for row in cut]


def test_a_text_too_long_for_one_of_the_models_is_left_out_and_the_rest_keep_their_place(tiny, other):
    prompts = [PROMPTS[0], "Say it again. " * 2000, PROMPTS[2]]
    readings = [Reading(*pair, prompts, ANSWERS) for pair in (tiny, other)]
    found = forced_agreement(readings[0], {"other": readings[1]}, 400)
    assert found[1] is None and found[0] and found[2]
    assert answer_nats(readings[0])[1] is None


def test_an_answer_that_was_cut_is_not_held_to_have_ended(tiny):
    reading = Reading(*tiny, PROMPTS, ANSWERS, [True, False, True])
    ended, cut = answer_nats(Reading(*tiny, PROMPTS, ANSWERS))[1], answer_nats(reading)[1]
    assert cut["tokens"] == ended["tokens"] - 1 and cut["nats"] < ended["nats"]


def test_an_empty_answer_that_was_cut_has_no_likelihood(tiny):
    assert answer_nats(Reading(*tiny, PROMPTS[:1], [""], [False])) == [None]

import copy

import pytest
import torch

from distill_app.measuring.scores import chrf, count_steps, is_right, response_losses


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Step 1: 3 + 4 = 7.\nThe answer is \\boxed{7}.", True),
        ("The answer is \\boxed{8}.", False),
        ("First I thought 8, but it is \\boxed{7}. Not 9.", True),
        ("So there are 7 pears left.", True),
        ("It costs $7.00.", True),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_a_final_answer_is_judged_as_mathematics(answer, right):
    assert is_right(answer, "Step 1: 3 + 4 = 7.\nThe answer is \\boxed{7}.") is right


def test_the_last_final_answer_counts():
    for answer in (
        "\\boxed{7} then \\boxed{5}",
        "$\\boxed{\\frac{14}{2}}$, no: $\\boxed{\\frac{10}{2}}$",
        "7, no, 5",
    ):
        assert is_right(answer, "5") is True and is_right(answer, "7") is False
    assert is_right("5", "\\boxed{7}, or rather \\boxed{5}") is True


@pytest.mark.parametrize("reference", ["Yes", "Paris", "", "It depends."])
def test_a_reference_without_an_answer_to_read_judges_nobody(reference):
    assert is_right("Yes", reference) is None and is_right("5", reference) is None


@pytest.mark.parametrize(
    ("answer", "steps"),
    [
        ("Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\nThe answer is \\boxed{14}.", 2),
        ("3 + 4 = 7. Then 7 * 2 = 14. The answer is 14.", 2),
        ("1. Add them.\n2. Double them.", 2),
        ("The answer is 14.", 0),
        ("14", 0),
        ("", 0),
    ],
)
def test_steps_are_lines_or_sentences_that_calculate(answer, steps):
    assert count_steps(answer) == steps


def test_equal_answers_overlap_fully_and_others_little():
    assert chrf("a red fox", "a red fox") == 100.0
    assert chrf("zzz", "a red fox") < 10
    assert chrf("", "a red fox") == 0


def test_the_loss_is_that_of_the_response_tokens_and_eos(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    prompts, responses = ["User: a\nAssistant:", "User: bb\nAssistant:"], [" one two", " three"]
    found = response_losses(model, tokenizer, prompts, responses)
    for prompt, response, (nats, tokens) in zip(prompts, responses, found, strict=True):
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        logprobs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        expected = -sum(logprobs[len(head) + i - 1, t].item() for i, t in enumerate(tail))
        assert (nats, tokens) == (pytest.approx(expected, rel=1e-5), len(tail))

import copy

import pytest
import torch
import yaml
from conftest import ROOT
from fakes import label_params

from distill_app.comparison.compare import _teacher_with_weights
from distill_app.comparison.params import CompareParams
from distill_app.comparison.scores import (
    count_steps,
    is_right,
    mean_token_loss,
    overlap_score,
    summary_of_reasoning,
)


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
    assert overlap_score(["a red fox"], ["a red fox"]) == 100.0
    assert overlap_score(["zzz"], ["a red fox"]) < 10


def test_the_loss_is_that_of_the_response_tokens_and_eos(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    prompts, responses = ["User: a\nAssistant:", "User: bb\nAssistant:"], [" one two", " three"]
    total, count = 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        logprobs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        total -= sum(logprobs[len(head) + i - 1, t].item() for i, t in enumerate(tail))
        count += len(tail)
    found = mean_token_loss(model, tokenizer, prompts, responses)
    assert found == pytest.approx(total / count, rel=1e-5)


def test_shares_are_of_all_answers():
    answers = [
        {"right": True, "steps": 2, "cut": False},
        {"right": False, "steps": 1, "cut": True},
        {"right": False, "steps": 3, "cut": False},
        {"right": False, "steps": 0, "cut": False},
    ]
    assert summary_of_reasoning(answers) == {"accuracy": 0.25, "multi_step": 0.5, "cut": 0.25}


def test_a_teacher_behind_a_server_is_compared_by_weights_of_its_own():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    compare = CompareParams(**params["compare"])
    served = label_params(engine="openai", base_url="http://localhost:1/v1", teacher="big", revision="v2")
    with pytest.raises(ValueError, match=r"compare\.teacher: found null.*\(big\) is a server's; set it"):
        _teacher_with_weights(compare, served)
    chosen = _teacher_with_weights(compare.model_copy(update={"teacher": "a/b"}), served)
    assert (chosen.teacher, chosen.revision) == ("a/b", None)
    assert _teacher_with_weights(compare, label_params()) == label_params()

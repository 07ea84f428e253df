import copy

import pytest
import torch

from distill_app import infer_student, label_with_teacher
from distill_app.core.prompts import format_prompt
from distill_app.labeling.answers import Answer, Sampling
from distill_app.labeling.engine import generate
from distill_app.labeling.label import select_answers

PROMPTS = ["Name three", "Step 1:", "The quick brown fox jumps over", "x", "Think step by step."]


def reference_greedy(model, tokenizer, prompt, limit):
    """transformers' own generate, one prompt at a time."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def exact(tiny):
    """A float32 copy, in which no rounding flips a token."""
    return copy.deepcopy(tiny[0]).float(), tiny[1]


def test_greedy_answers_equal_those_of_transformers(exact):
    model, tokenizer = exact
    answers = generate(model, tokenizer, PROMPTS, Sampling(24), batch_size=3)
    assert [a.text for a in answers] == [reference_greedy(model, tokenizer, p, 24) for p in PROMPTS]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_does_not_depend_on_its_batch(exact, temperature):
    model, tokenizer = exact
    sampling = Sampling(24, temperature, 0.9, seed=5)
    together = generate(model, tokenizer, PROMPTS, sampling, batch_size=5)
    alone = [generate(model, tokenizer, [p], sampling)[0] for p in PROMPTS]
    turned = generate(model, tokenizer, PROMPTS[::-1], sampling, batch_size=2)[::-1]
    assert together == alone == turned


def test_another_seed_gives_other_samples(tiny):
    one, two = (generate(*tiny, PROMPTS, Sampling(24, 1.0, 1.0, seed=seed)) for seed in (1, 2))
    assert one != two


def test_a_row_that_ends_leaves_and_the_others_go_on(tiny, monkeypatch):
    """The first token of the vocabulary's end is forced after as many steps as the prompt's number."""
    model, tokenizer = tiny
    lengths = {1: 2, 2: 5, 3: 9, 4: 9, 5: 1}
    seen = []

    def choose(logits, generators, sampling):
        step = len(seen)
        seen.append(len(logits))
        alive = [n for n in order if n in running]
        tokens = []
        for n in alive:
            tokens.append(tokenizer.eos_token_id if step + 1 >= lengths[n] else 50 + n)
        if len([n for n in alive if step + 1 < lengths[n]]) < 0.75 * len(alive):
            running.intersection_update(n for n in alive if step + 1 < lengths[n])
        return torch.tensor(tokens)

    prompts = ["a " * n for n in (1, 2, 3, 4, 5)]
    order = [5, 4, 3, 2, 1]  # longest prompt first
    running = set(order)
    monkeypatch.setattr("distill_app.labeling.engine._choose", choose)
    answers = generate(model, tokenizer, prompts, Sampling(20))
    assert [a.tokens for a in answers] == [lengths[n] for n in (1, 2, 3, 4, 5)]
    assert {a.finish_reason for a in answers} == {"stop"}
    assert seen[0] == 5 and seen[-1] < 5


def test_an_answer_at_the_limit_is_marked_cut(tiny):
    answer = generate(*tiny, ["Name three"], Sampling(1))[0]
    assert (answer.tokens, answer.finish_reason) == (1, "length")


def test_for_measuring_speed_every_answer_runs_to_the_limit(tiny, monkeypatch):
    eos = tiny[1].eos_token_id
    monkeypatch.setattr(
        "distill_app.labeling.engine._choose", lambda logits, *_: torch.full((len(logits),), eos)
    )
    assert generate(*tiny, ["a"], Sampling(5))[0].tokens == 1
    assert generate(*tiny, ["a"], Sampling(5, stop_at_eos=False))[0].tokens == 5


def test_no_prompts_give_no_answers(tiny):
    assert generate(*tiny, [], Sampling(4)) == []


def test_labels_come_in_order_and_keep_instruction_and_input(exact):
    items = [
        {"instruction": "a", "input": "b"},
        {"instruction": "c"},
        {"instruction": "a", "input": "b"},
    ]
    labeled = label_with_teacher(*exact, items, max_new_tokens=8)
    assert [(r["instruction"], r["input"]) for r in labeled] == [("a", "b"), ("c", ""), ("a", "b")]
    assert labeled[0]["output"] == labeled[2]["output"]
    assert labeled == label_with_teacher(*exact, items, max_new_tokens=8, batch_size=1)


def test_cut_and_empty_answers_are_dropped_and_counted():
    items = [{"instruction": str(n), "input": ""} for n in range(4)]
    answers = [
        Answer("yes", 2, "stop"),
        Answer("no", 9, "length"),
        Answer("", 1, "stop"),
        Answer("k", 4, "stop"),
    ]
    kept, counts = select_answers(items, answers, "drop")
    assert [r["output"] for r in kept] == ["yes", "k"]
    assert counts["dropped"] == {"empty": 1, "truncated": 1}
    assert counts["instructions"] == 4 and counts["tokens_out"] == 16
    assert len(select_answers(items, answers, "keep")[0]) == 3


def test_a_student_is_asked_in_the_words_of_format_prompt(tiny, monkeypatch):
    asked = []

    def fake(model, tokenizer, prompts, sampling):
        asked.extend(prompts)
        return [Answer("Fine.", 2, "stop")]

    monkeypatch.setattr("distill_app.labeling.infer.generate", fake)
    assert infer_student(*tiny, "How are you?", mode="system2", max_new_tokens=7) == "Fine."
    assert asked == [format_prompt("How are you?", mode="system2")]

"""The task that comes with the project: well-formed, fair, and nothing that a student was trained on."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from distill_app.core.texts import normalise

DATA = Path(__file__).parents[1] / "data"
QUESTIONS = [json.loads(line) for line in (DATA / "tasks/everyday/questions.jsonl").read_text().splitlines()]


def test_each_of_100_questions_has_four_different_choices_and_the_answer_is_in_no_favoured_place():
    assert len({normalise(q["question"]) for q in QUESTIONS}) == len(QUESTIONS) == 100
    for q in QUESTIONS:
        assert set(q) == {"question", "choices", "answer"}
        assert len({normalise(choice) for choice in q["choices"]}) == len(q["choices"]) == 4
    assert Counter(q["answer"] for q in QUESTIONS) == {0: 25, 1: 25, 2: 25, 3: 25}


def test_no_question_names_its_answer():
    for q in QUESTIONS:
        answer, text = normalise(q["choices"][q["answer"]]), normalise(q["question"])
        assert f" {answer} " not in f" {text} "


def test_no_question_is_in_the_training_data():
    """Neither whole, nor with half of its words in common with one of the sample's."""
    shard = "data/train-00000-of-00001.parquet"
    asked = [
        *pq.read_table(DATA / "sample/DistilQwen_100k" / shard)["instruction"].to_pylist(),
        *pq.read_table(DATA / "sample/OmniThought" / shard)["question"].to_pylist(),
    ]
    trained = [normalise(text) for text in asked]
    words = [set(text.split()) for text in trained]
    for q in QUESTIONS:
        text = normalise(q["question"])
        mine = set(text.split())
        assert not [other for other in trained if text in other]
        assert not [other for other in words if len(mine & other) / len(mine | other) >= 0.5], text

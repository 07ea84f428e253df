"""Several answers a prompt: which is kept, why, and that each is asked once."""

import json

import pytest
from fakes import Echo, label_folder
from test_labeling_label import write_split

from distill_app import read_json
from distill_app.generation.answers import Answer
from distill_app.labeling.choosing import Choice, choose_answer


def said(*texts):
    """An empty text is one that was cut."""
    return [Answer(text or "The answer is", 5, "stop" if text else "length") for text in texts]


@pytest.mark.parametrize(
    ("texts", "reference", "expected"),
    [
        (["The answer is 7.", "So \\boxed{1/2}.", "It is 0.5"], "\\boxed{0.5}", Choice(1, "right", 2)),
        (["The answer is 7.", "The answer is 8."], "The answer is 9.", Choice(None, "none right")),
        (["The answer is 7."], "Be kind.", Choice(None, "no reference")),
        (["", ""], "The answer is 9.", Choice(None, "none whole")),
    ],
)
def test_the_first_right_answer_is_kept(texts, reference, expected):
    assert choose_answer(said(*texts), reference, "reference") == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["The answer is 7.", "So \\boxed{0.5}.", "", "\\boxed{\\frac{1}{2}}"], Choice(1, "majority", 2)),
        (["The answer is 7.", "The answer is 8."], Choice(0, "majority", 1)),
        (["", "Be kind.", "be  KIND."], Choice(1, "majority", 2)),
        (["", ""], Choice(None, "none whole")),
    ],
)
def test_the_first_of_the_largest_group_is_kept(texts, expected):
    assert choose_answer(said(*texts), "", "majority") == expected


class Drawing(Echo):
    """Answers by the seed: seeds 0 and 3 are wrong, 1 and 2 right; a prompt that ends in 8 is always wrong."""

    def answer(self, prompt, sampling):
        number = int(prompt.split()[-1])
        right = sampling.seed in (1, 2) and number != 8
        found = number if right else 99 + sampling.seed
        return Answer(f"By {sampling.seed}. The answer is {found}", 6, "stop", 3)


SAMPLING = {"temperature": 0.7, "seed": 0, "samples": 4}


def write_problems(folder):
    for split in ("train", "heldout"):
        write_split(folder, split, [3, 8, 4])
        records = json.loads((folder / f"{split}.json").read_text())
        for record in records:
            record["output"] = f"The answer is {record['input']}."
        (folder / f"{split}.json").write_text(json.dumps(records))


def test_of_several_answers_the_right_one_is_kept_and_told(tmp_path):
    write_problems(tmp_path)
    engine = Drawing()
    metrics = label_folder(tmp_path, tmp_path / "s", engine, **SAMPLING, choose="reference")
    labeled = read_json(tmp_path / "train_labeled.json")
    assert [r["output"] for r in labeled] == ["By 1. The answer is 3", "By 1. The answer is 4"]
    assert metrics["train"]["samples"] == {
        "chosen": {"none right": 1, "right": 2},
        "agreeing_mean": 2.0,
        "tokens_out": 3 * 4 * 6,
    }
    assert metrics["train"]["kept"] == 2 and metrics["train"]["dropped"]["none right"] == 1
    dropped = read_json(tmp_path / "dropped.json")
    assert [(d["split"], d["reason"], d["input"]) for d in dropped][:1] == [("train", "none right", "8")]
    asked = len(engine.asked)
    label_folder(tmp_path, tmp_path / "s", engine, **SAMPLING, choose="majority")
    assert len(engine.asked) == asked  # another choice among the same answers
    labeled = read_json(tmp_path / "train_labeled.json")
    assert [r["output"][:5] for r in labeled] == ["By 1.", "By 0.", "By 1."]


def test_more_samples_ask_only_for_those(tmp_path):
    write_problems(tmp_path)
    engine = Drawing()
    label_folder(tmp_path, tmp_path / "s", engine, **{**SAMPLING, "samples": 1})
    first = len(engine.asked)
    label_folder(tmp_path, tmp_path / "s", engine, **SAMPLING)
    assert len(engine.asked) == 4 * first


def test_several_greedy_answers_are_refused(tmp_path):
    write_problems(tmp_path)
    with pytest.raises(ValueError, match=r"label\.samples: found 4 with temperature 0, expected 1"):
        label_folder(tmp_path, tmp_path / "s", Drawing(), **{**SAMPLING, "temperature": 0.0})

"""Several answers a prompt: which is kept, why, and that each is asked once."""

import json
import shutil

import pytest
from fakes import Echo, label_folder, label_params
from test_labeling_label import write_split

from distill_app import read_json
from distill_app.generation.answers import Answer
from distill_app.labeling.choosing import Choice, choose_answer
from distill_app.labeling.scoring import open_scorer
from distill_app.labeling.store import AnswerStore


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
        (["The answer is 7.", "So \\boxed{0.5}.", "", "\\boxed{\\frac{1}{2}}"], Choice(1, "majority", 2, 1)),
        (["The answer is 7.", "The answer is 8."], Choice(0, "tied", 1, 0)),
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
        "first": 0,
        "agreeing_share": 0.5,
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


def test_the_best_score_is_kept_and_of_equals_the_first():
    answers = said("Red.", "", "Blue.", "red.", "Green.")
    kept = choose_answer(answers, "", "likelihood", {0: -0.5, 2: -0.25, 3: -0.75, 4: -0.375})
    assert kept == Choice(2, "likelihood", 1, 0.125)
    assert choose_answer(answers, "", "judge", {0: 3, 2: 1, 3: 2, 4: 3}) == Choice(0, "tied", 2, 0)
    assert choose_answer(answers, "", "judge", {}) == Choice(None, "not scored")
    assert choose_answer(said("Red.", "red. "), "", "judge", {0: 1, 1: 2}) == Choice(1, "judge", 2, None)


class Judge(Drawing):
    """Prefers the answer of the highest seed, but for requests that end in 8, where it says nothing clear."""

    def answer(self, prompt, sampling):
        if "<answer_a>" not in prompt:
            return super().answer(prompt, sampling)
        if "8\n</request>" in prompt:
            return Answer("Hard to say.", 3, "stop", 9)
        first, second = (int(part.split(".")[0]) for part in prompt.split("By ")[1:3])
        return Answer("Verdict: " + ("A" if first > second else "B"), 3, "stop", 9)


def kept_seeds(folder):
    return [int(r["output"].split(".")[0].split()[1]) for r in read_json(folder / "train_labeled.json")]


def test_a_judge_that_is_the_teacher_chooses_and_is_not_asked_twice(tmp_path):
    write_problems(tmp_path)
    engine = Judge()
    metrics = label_folder(tmp_path, tmp_path / "s", engine, **SAMPLING, choose="judge")
    assert kept_seeds(tmp_path) == [3, 0, 3]  # by majority 1, 0, 1
    assert metrics["train"]["samples"] == {
        "chosen": {"judge": 2, "tied": 1},
        "first": 1,
        "agreeing_share": round(3 / 12, 4),
        "margin_mean": round((2 + 0 + 2) / 3, 4),
        "verdicts": {"read": 24, "unread": 12},
        "tokens_out": 72,
    }
    asked, labeled = len(engine.asked), (tmp_path / "train_labeled.json").read_bytes()
    assert label_folder(tmp_path, tmp_path / "s", engine, **SAMPLING, choose="judge") == metrics
    assert len(engine.asked) == asked and (tmp_path / "train_labeled.json").read_bytes() == labeled


def test_a_run_killed_among_verdicts_goes_on_to_the_same_bytes(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_problems(tmp_path / name)
    label_folder(tmp_path / "whole", tmp_path / "whole/s", Judge(), **SAMPLING, choose="judge")
    engine = Judge(ahead=1)

    def die(prompt):
        if len([p for p in engine.asked if "<answer_a>" in p]) == 9:
            raise KeyboardInterrupt

    engine.before_answer = die
    with pytest.raises(KeyboardInterrupt):
        label_folder(tmp_path / "killed", tmp_path / "killed/s", engine, **SAMPLING, choose="judge")
    again = Judge()
    label_folder(tmp_path / "killed", tmp_path / "killed/s", again, **SAMPLING, choose="judge")
    verdicts = [p for p in again.asked if "<answer_a>" in p]
    assert len(verdicts) == len(again.asked) == 36 - 8
    for split in ("train", "heldout"):
        file = f"{split}_labeled.json"
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_judge_of_its_own_takes_the_teachers_place(tmp_path, monkeypatch):
    write_problems(tmp_path)
    opened, closed = [], []

    class Own(Judge):
        def __init__(self):
            super().__init__()
            self.identity = {"engine": "fake", "version": "judge"}

        def close(self):
            closed.append("judge")

    def open_engine(params):
        opened.append(params)
        return Own()

    monkeypatch.setattr("distill_app.labeling.judge.open_engine", open_engine)
    teacher = Drawing()
    teacher.close = lambda: closed.append("teacher")
    label_folder(
        tmp_path, tmp_path / "s", teacher, **SAMPLING, choose="judge", judge="org/judge", judge_revision="r"
    )
    assert kept_seeds(tmp_path) == [3, 0, 3] and closed == ["teacher", "judge"]
    assert (opened[0].teacher, opened[0].revision, opened[0].engine) == ("org/judge", "r", "transformers")
    assert not any("<answer_a>" in prompt for prompt in teacher.asked)


def test_a_server_judge_without_an_address_is_told_before_any_answer(tmp_path):
    write_problems(tmp_path)
    engine = Drawing()
    with pytest.raises(ValueError, match=r"label\.judge_base_url: found none, expected the server's address"):
        label_folder(
            tmp_path, tmp_path / "s", engine, **SAMPLING, choose="judge", judge="big", judge_engine="openai"
        )
    assert not engine.asked


class Words(Drawing):
    """Answers with texts that the tiny teacher finds unlike likely."""

    def answer(self, prompt, sampling):
        texts = ["Quick x9 lazy", "The quick brown fox", "0123", "Quick x9 lazy"]
        return Answer(texts[sampling.seed], 4, "stop", 3)


def test_the_likeliest_answer_is_kept_whatever_its_company(tmp_path, tiny, tiny_model_dir):
    write_problems(tmp_path)
    changes = {**SAMPLING, "choose": "likelihood", "teacher": str(tiny_model_dir)}
    metrics = label_folder(tmp_path, tmp_path / "s", Words(), **changes)
    model, tokenizer = tiny
    outputs = [r["output"] for r in read_json(tmp_path / "train_labeled.json")]
    texts = ["Quick x9 lazy", "The quick brown fox", "0123"]
    prompts = [f"say {n} {number}" for n, number in enumerate([3, 8, 4])]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == max(texts, key=lambda text: mean_logprob(model, tokenizer, prompt, text))
    assert len(outputs) == 3 and outputs != ["Quick x9 lazy"] * 3  # which majority keeps
    samples = metrics["train"]["samples"]
    assert samples["margin_mean"] > 0 and samples["first"] == outputs.count("Quick x9 lazy")
    shutil.copy(tmp_path / "train_labeled.json", tmp_path / "before.json")
    (tmp_path / "train.json").write_text(json.dumps(read_json(tmp_path / "train.json")[1:]))
    label_folder(tmp_path, tmp_path / "s", Words(), **changes)
    assert read_json(tmp_path / "train_labeled.json") == read_json(tmp_path / "before.json")[1:]


def mean_logprob(model, tokenizer, prompt, text):
    import torch

    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = model(torch.tensor([head + tail])).logits[0].double()[len(head) - 1 : -1]
    return logits.log_softmax(-1)[range(len(tail)), tail].mean().item()


def test_a_server_that_keeps_its_weights_tells_no_likelihood():
    params = label_params(**SAMPLING, choose="likelihood", engine="openai")
    with (
        AnswerStore(None) as store,
        pytest.raises(ValueError, match=r"label\.choose: found likelihood with label\.engine: openai"),
    ):
        open_scorer(Drawing(), store, params)

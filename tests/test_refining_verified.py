"""Verification rounds: what is sampled for, what is kept, what a killed run ends with."""

import json
from pathlib import Path

import pytest

from distill_app.core.params import read_section
from distill_app.data.frames import frame, masked
from distill_app.easydistill.config import write_system2_config
from distill_app.generation.answers import Answer
from distill_app.labeling.params import LabelParams
from distill_app.refining import verified
from distill_app.refining.params import RefineS2Params
from distill_app.refining.verified import VerifiedInputs, read_problems, refine_by_verification

ROOT = Path(__file__).parents[1]
RECORDS = [
    {"instruction": f"{name} has {n} pens. How many are left?", "input": "", "output": f"So \\boxed{{{n}}}."}
    for n, name in enumerate(("Mia", "Ben", "Leo", "Zoe", "Tom", "Ada"), start=3)
]
HELDOUT = [{"instruction": "Where did you put the 4 hats?", "input": "", "output": "\\boxed{4}"}]
INPUTS = VerifiedInputs("student", "configs/system2.json", "data.json", "heldout.json")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    Path("student").symlink_to(tiny_model_dir)
    write("data.json", RECORDS)
    write("heldout.json", HELDOUT)
    training = {"save_steps": 1, "learning_rate": 1e-2, "gradient_accumulation_steps": 1, "eval_steps": 1}
    extra = {"backend": "builtin", "validation": {"fraction": 0.4}}
    write_system2_config("configs/system2.json", "student", "data.json", training=training, extra=extra)


def write(path, records):
    Path(path).write_text(json.dumps(records))


def params(**changed):
    values = read_section("refine_s2", RefineS2Params).model_dump()
    few = {"method": "verified", "rounds": 2, "samples": 3, "keep": 2, "max_new_tokens": 8}
    return RefineS2Params.model_validate({**values, **few, **changed})


def refine(out, **changed):
    label = read_section("label", LabelParams)
    return refine_by_verification(params(**changed), label, INPUTS, out, f"metrics/{out}.json")


@pytest.fixture
def judged(monkeypatch):
    """A tiny model is never right, so here what begins with some letters is."""
    monkeypatch.setattr(verified, "is_right", lambda text, reference: len(text) % 2 == 0)
    monkeypatch.setattr(verified, "_is_whole", lambda answer: bool(answer.text))


def rounds(number=2, **changed):
    made = verified._Rounds(params(**changed), None, INPUTS, None, None, RECORDS, RECORDS[:number], Path("w"))
    return made


def answers(*texts):
    return [Answer(text, 5, "stop") for text in texts]


def test_distinct_right_answers_are_kept_up_to_a_number_over_all_rounds():
    made = rounds()
    trace = RECORDS[1]["output"]
    some = [answers("It is 3.", "it is 3", "No, 4.", "So 3."), answers(trace, "Well, 4.")]
    made._keep(some, [[True, True, False, True], [True, True]])
    assert made._kept == [["It is 3.", "So 3."], ["Well, 4."]]
    made._keep([answers("3, then."), answers("Well, 4.", "4!")], [[True], [True, True]])
    assert made._kept == [["It is 3.", "So 3."], ["Well, 4.", "4!"]]


def test_no_problem_is_like_a_held_out_one():
    other = {"instruction": "Zoe counts 7 cups. What does she see?", "input": "", "output": "\\boxed{7}"}
    same_text = {**HELDOUT[0], "instruction": "where did you put the 4 hats"}
    same_but_for_numbers = {**HELDOUT[0], "instruction": "Where did you put the 9 hats?"}
    same_frame = {**HELDOUT[0], "instruction": "Where did you put the 4 coats?"}
    write("more.json", [other, same_text, same_but_for_numbers, same_frame, RECORDS[0]])
    problems, left_out = read_problems("data.json", "more.json", "heldout.json")
    assert problems == [*RECORDS, other] and left_out == 3
    for of in (masked, frame):
        assert not {of(p["instruction"]) for p in problems} & {of(HELDOUT[0]["instruction"])}


def test_a_known_frame_held_out_by_text_alone_leaves_its_other_problems_in():
    write("heldout.json", [{**RECORDS[0], "instruction": "Ann has 3 cups. How many are left?"}])
    problems, left_out = read_problems("data.json", None, "heldout.json")
    assert (problems, left_out) == (RECORDS, 0)


def test_nothing_left_is_told():
    write("heldout.json", RECORDS)
    with pytest.raises(ValueError, match="data.json: all of 6 problems are like held-out ones"):
        read_problems("data.json", None, "heldout.json")


def test_data_without_answers_is_an_error_of_one_line():
    write("data.json", [*RECORDS, {"instruction": "Why?", "input": "", "output": "Because\nof it."}])
    with pytest.raises(
        ValueError, match=r"data.json: record 6: output: found no final answer in 'Because of it.', expected"
    ):
        refine("refined")


def test_white_box_training_is_refused():
    config = json.loads(Path("configs/system2.json").read_text())
    config |= {"job_type": "kd_white_box_train_only"}
    config["dataset"]["logits_path"] = "logits.arrow"
    Path("configs/system2.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="train_s2.kd_ratio: found above 0 with refine_s2.method: verified"):
        refine("refined")


def test_no_right_answer_is_an_error_of_one_line():
    with pytest.raises(ValueError, match="student: none of its 3 answers to each of 6 problems is right"):
        refine("refined")
    assert not Path("refined").exists()


@pytest.mark.parametrize("start", ["before", "trained"])
def test_rounds_leave_a_checkpoint_with_its_records(judged, start):
    metrics = refine("refined", start=start)
    table = [line.split(",") for line in Path("refined/rounds.csv").read_text().splitlines()]
    assert table[0] == list(verified.COLUMNS) and [line[0] for line in table[1:]] == ["1", "2"]
    assert metrics == json.loads(Path("metrics/refined.json").read_text())
    assert metrics["problems"] == 6 and metrics["examples"] == 6 + metrics["kept"] > 6
    assert 0 < metrics["right"] <= metrics["solved"] <= 1 and 0 <= metrics["right_validation"] <= 1
    assert Path("metrics/refined_rounds.csv").read_bytes() == Path("refined/rounds.csv").read_bytes()
    origin = json.loads(Path("refined/provenance.json").read_text())
    assert origin["job_type"] == "verified" and origin["training"]["start"] == start
    assert "verified" in Path("refined/README.md").read_text()
    assert "round-" not in Path("refined/README.md").read_text()


def test_a_killed_run_asks_nothing_again_and_ends_with_the_same_bytes(judged, monkeypatch):
    refine("whole")
    train, ask, asked = verified.run_easy_distill, verified.fill_store, []

    def killed_in_the_second(config):
        if "round-2" in config:
            raise KeyboardInterrupt
        return train(config)

    with monkeypatch.context() as patched:
        patched.setattr(verified, "run_easy_distill", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            refine("killed")
    assert not Path("killed").exists()
    monkeypatch.setattr(verified, "fill_store", lambda *a, **k: asked.append(ask(*a, **k)))
    refine("killed")
    assert sum(asked[:-1]) == 0  # the last asks the second round's student to validate
    for name in ("model.safetensors", "rounds.csv"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_failed_training_ends_the_rounds(judged, monkeypatch):
    monkeypatch.setattr(verified, "run_easy_distill", lambda config: 3)
    with pytest.raises(verified.TrainingError, match="round 1: training failed with exit code 3"):
        refine("refined")
    assert not Path("refined").exists()

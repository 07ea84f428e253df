import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_tiny_model
from fakes import label_params

from distill_app.labeling import engine
from distill_app.labeling.candidates import Candidate, five_models
from distill_app.measuring import measure
from distill_app.measuring.measure import measure_models, prompt_of
from distill_app.measuring.params import MeasureParams

NAMES = ["teacher", "system1_before", "system1", "system2_before", "system2"]
SMALL = {
    "instruction_prompts": 2,
    "reasoning_prompts": 3,
    "max_new_tokens": 6,
    "speed_prompts": 2,
    "speed_tokens": 3,
}


def params_of(**changes: object) -> MeasureParams:
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["measure"]
    return MeasureParams(**{**section, **SMALL, **changes})


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_model_dir) -> Path:
    """Five tiny models and held-out data of both tasks; do not change it."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(tiny_model_dir, folder / "teacher")
    for seed, name in enumerate(("before1", "before2", "models/system1", "models/system2"), 1):
        make_tiny_model(folder / name, layers=2, seed=seed)
    (folder / "data").mkdir()
    instructions = [{"instruction": f"Say {n}", "input": "", "output": f"It is {n}."} for n in range(3)]
    problems = [
        {"instruction": f"{n} + 1?", "input": "", "output": f"The answer is \\boxed{{{n + 1}}}."}
        for n in range(4)
    ]
    (folder / "data/heldout_s1_labeled.json").write_text(json.dumps(instructions))
    (folder / "data/heldout_s2.json").write_text(json.dumps(problems))
    return folder


def run(lab: Path, reports: Path, **changes: object) -> tuple[dict, dict]:
    params = params_of(**changes)
    label = label_params(teacher=str(lab / "teacher"), store=str(reports / "answers.sqlite"))
    before = str(lab / "before1"), str(lab / "before2")
    models = five_models(label, None, *before, models_dir=str(lab / "models"))
    measure_models(models, params, label, str(lab / "data"), str(reports))
    return tuple(json.loads((reports / name).read_text()) for name in ("answers.json", "costs.json"))


def test_every_prompt_is_answered_by_all_five_and_each_answer_is_worth_something(lab, tmp_path):
    answers, costs = run(lab, tmp_path)
    assert [len(answers[task]) for task in ("instructions", "reasoning")] == [2, 3]
    for row in answers["instructions"]:
        assert list(row) == ["prompt", "reference", *NAMES]
        for name in NAMES:
            assert 0 <= row[name]["chrf"] <= 100 and row[name]["reference_tokens"] > 1
            assert row[name]["reference_nats"] > 0 and row[name]["tokens"] <= 6
    for row in answers["reasoning"]:
        for name in NAMES:
            assert {"text", "tokens", "cut", "refused", "right", "steps"} == set(row[name])
            assert not row[name]["refused"]
    assert list(costs) == NAMES
    for cost in costs.values():
        assert len(cost["alone_sec"]) == len(cost["batch_sec"]) == 2 and min(cost["alone_sec"]) > 0
        assert 0 < cost["peak_memory_bytes"] < 1e9 and cost["weights"].startswith("sha256:")
    assert costs["system1"]["parameters"] < costs["teacher"]["parameters"]


def test_each_model_is_loaded_once_and_a_second_run_asks_none_of_them_again(lab, tmp_path, monkeypatch):
    loaded: list[str] = []
    load = measure.load_teacher
    monkeypatch.setattr(measure, "load_teacher", lambda *args: loaded.append(args[0]) or load(*args))
    first, _ = run(lab, tmp_path)
    assert len(loaded) == len(set(loaded)) == 5

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a stored answer was asked again")

    monkeypatch.setattr("distill_app.labeling.in_process.stream_answers", refuse)
    assert run(lab, tmp_path)[0] == first
    assert engine.stream_answers is not refuse  # speed is measured, not stored


def test_the_teacher_is_asked_in_its_chat_format_and_a_student_in_its_own(tiny):
    record = {"instruction": "Add 2 and 3.", "input": "", "output": "5"}
    tokenizer = tiny[1]
    teacher = Candidate("teacher", "t", None)
    assert "step by step" in prompt_of(teacher, tokenizer, "reasoning", record)
    assert "step by step" not in prompt_of(teacher, tokenizer, "instructions", record)
    assert prompt_of(teacher, tokenizer, "instructions", record).startswith("<s>user")
    student = Candidate("system2", "s", "system2")
    prompts = {prompt_of(student, tokenizer, task, record) for task in ("instructions", "reasoning")}
    assert prompts == {"User: Add 2 and 3.\nThink step by step.\nAssistant:"}


def test_a_teacher_behind_a_server_is_measured_by_weights_of_its_own(lab):
    before = str(lab / "before1"), str(lab / "before2"), str(lab / "models")
    served = label_params(engine="openai", base_url="http://localhost:1/v1", teacher="big", revision="v2")
    with pytest.raises(ValueError, match=r"measure\.teacher: found null.*\(big\) is a server's; set it"):
        five_models(served, None, *before)
    chosen = five_models(served, "a/b", *before)[0]
    assert (chosen.model, chosen.revision) == ("a/b", None)
    own = label_params(teacher="big", revision="v2")
    assert five_models(own, None, *before)[0].revision == "v2"


def test_a_student_that_is_not_whole_is_told_before_any_model_is_asked(lab, tmp_path):
    shutil.copytree(lab / "models", tmp_path / "models")
    (tmp_path / "models/system2/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"system2: no \*\.safetensors file"):
        five_models(label_params(), None, "a/b", "a/b", str(tmp_path / "models"))


def with_instructions(lab: Path, folder: Path, instructions: list[str]) -> Path:
    """A copy of the lab that holds out these instructions."""
    for path in lab.iterdir():
        if path.name != "data":
            (folder / path.name).symlink_to(path)
    shutil.copytree(lab / "data", folder / "data")
    records = [{"instruction": text, "input": "", "output": "It is so."} for text in instructions]
    (folder / "data/heldout_s1_labeled.json").write_text(json.dumps(records))
    return folder


def short_student(lab: Path, positions: int) -> None:
    """Let System 1 read no more than so many tokens."""
    weights = (lab / "models").resolve()
    (lab / "models").unlink()
    shutil.copytree(weights, lab / "models")
    config = json.loads((lab / "models/system1/config.json").read_text())
    (lab / "models/system1/config.json").write_text(
        json.dumps({**config, "max_position_embeddings": positions})
    )


def test_a_prompt_too_long_for_a_student_is_no_instant_answer(lab, tmp_path):
    long, short = "Say it again. " * 40, ["Say 1", "Say 2"]
    lab = with_instructions(lab, tmp_path, [long, *short])
    short_student(lab, 120)
    answers, costs = run(lab, tmp_path / "reports", instruction_prompts=3, speed_prompts=3)
    refused = {row["prompt"]: [row[name]["refused"] for name in NAMES] for row in answers["instructions"]}
    assert refused == {long.strip(): [False, False, True, False, False], **{p: [False] * 5 for p in short}}
    for row in answers["instructions"]:
        assert ("reference_nats" in row["system1"]) != row["system1"]["refused"]
    for cost in costs.values():  # timed are the prompts that all five can read
        assert len(cost["alone_sec"]) == len(cost["batch_sec"]) == 2 and min(cost["alone_sec"]) > 0


def test_without_a_prompt_that_all_five_can_read_no_speed_is_made_up(lab, tmp_path):
    lab = with_instructions(lab, tmp_path, ["Say it again. " * 40])
    short_student(lab, 120)
    with pytest.raises(
        ValueError,
        match=r"measure\.speed_tokens: found 3, for which none of 1 held-out .*\(system1 has 120 positions\)",
    ):
        run(lab, tmp_path / "reports")


def test_which_prompts_are_asked_depends_on_their_texts_and_not_on_their_order(tmp_path):
    records = [{"instruction": f"Say {n}", "input": "", "output": "x"} for n in range(8)]
    for name, order in (("one", records), ("two", records[::-1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(order))
    asked = measure._sample(tmp_path / "one.json", 4)
    assert asked == measure._sample(tmp_path / "two.json", 4)
    assert sorted(map(str, asked)) != sorted(map(str, records[:4])) and all(one in records for one in asked)
    assert len(measure._sample(tmp_path / "one.json", 9)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_engine": "openai"}, r"measure\.judge_base_url: found none.*measure\.judge_engine: openai"),
        ({"judge": "no/where/at/all"}, r"measure\.judge: no/where/at/all: (?!.*label\.)"),
    ],
)
def test_a_judge_that_cannot_be_had_is_told_before_any_model_is_loaded(
    lab, tmp_path, monkeypatch, changes, message
):
    def refuse(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "load_teacher", refuse)
    with pytest.raises(ValueError, match=message):
        run(lab, tmp_path, **{"judge": "big", **changes})


def test_a_judge_behind_a_server_goes_with_labelling_on_ray(lab):
    label = label_params(engine_workers=4, ray_address="head:6379")
    params = params_of(judge="big", judge_engine="openai", judge_base_url="http://localhost:1/v1")
    with measure._open_judge(params, label) as judge:
        assert judge is not None and judge.teacher == "big"


def test_a_judge_says_of_every_students_answer_how_it_does_in_both_places(lab, tmp_path):
    answers, _ = run(lab, tmp_path, judge=str(lab / "teacher"))
    for row in answers["instructions"]:
        assert "against_teacher" not in row["teacher"]
        for name in NAMES[1:]:
            assert len(row[name]["against_teacher"]) == 2
            assert set(row[name]["against_teacher"]) <= {"won", "lost", "tied", "unread"}


def test_a_killed_run_leaves_no_half_written_report(lab, tmp_path):
    code = (
        "import os, signal, sys; sys.path[:0] = sys.argv[3:]\n"
        "import pathlib, test_measuring_measure as t\n"
        "from distill_app.measuring import measure\n"
        "def die(*args): os.kill(os.getpid(), signal.SIGKILL)\n"
        "measure.size_of = die\n"
        "t.run(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(lab), str(tmp_path), str(Path(__file__).parent)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr.decode()
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"answers.sqlite"}
    run(lab, tmp_path)
    assert (tmp_path / "answers.json").is_file()

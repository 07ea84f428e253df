import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_tiny_model
from fakes import label_params

from distill_app import load_student
from distill_app.evaluation.asking import contender, measure
from distill_app.evaluation.asking.contender import open_contender
from distill_app.evaluation.asking.measure import measure_models
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.evaluation.candidates import Candidate, TeacherParams, compared_models
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.batch import stream_answers
from distill_app.generation.endpoint import Endpoint
from distill_app.labeling.params import LabelParams

NAMES = ["teacher", "system1_before", "system1", "system2_before", "system2"]
ASKED = {
    "instructions": {"teacher", "system1_before", "system1"},
    "reasoning": {"teacher", "system2_before", "system2"},
}
SMALL = {
    "instruction_prompts": 3,
    "reasoning_prompts": 3,
    "fidelity_prompts": 2,
    "max_new_tokens": 6,
    "timed_prompts": 2,
    "load_prompts": 3,
    "timed_tokens": 3,
    "timed_rounds": 2,
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
    label = label_params(teacher=str(lab / "teacher"), store=str(reports / "store"))
    measure_models(models_of(lab, params, label), params, label, str(lab / "data"), str(reports))
    return tuple(json.loads((reports / name).read_text()) for name in ("answers.json", "costs.json"))


def models_of(lab: Path, params: TeacherParams, label: object) -> list[Candidate]:
    return compared_models(label, params, str(lab / "before1"), str(lab / "before2"), str(lab / "models"))


@pytest.mark.slow
def test_the_teacher_answers_both_tasks_and_each_student_its_own(lab, tmp_path):
    answers, costs = run(lab, tmp_path)
    for task, names in ASKED.items():
        assert len(answers[task]) == 3
        for row in answers[task]:
            assert set(row) - {"prompt", "reference", "forced", "free", "teacher_again"} == names
            for name in names:
                assert set(row[name]) == {"text", "tokens", "cut", "refused"} and row[name]["tokens"] <= 6
    assert list(costs) == NAMES
    for cost in costs.values():
        assert cost["weights"].startswith("sha256:") and cost["engine"] == "transformers"
    assert costs["system1"]["parameters"] < costs["teacher"]["parameters"]


@pytest.mark.slow
def test_fidelity_is_measured_between_a_floor_and_a_ceiling(lab, tmp_path):
    rows = run(lab, tmp_path)[0]["instructions"]
    assert ["forced" in row for row in rows] == [True, True, False]  # fidelity_prompts
    for row in rows[:2]:
        assert set(row["forced"]) == {
            "teacher",
            "teacher_as_student",
            "system1",
            "system1_other_prompt",
            "system1_before",
        }
        own = row["forced"]["teacher"]
        assert own["agreed"] == own["tokens"] and own["kl"] == 0
        assert set(row["free"]) == {"teacher", "teacher_again", "system1", "system1_other_prompt"}


@pytest.mark.slow
def test_only_the_teacher_and_the_students_are_timed_each_on_its_own_task(lab, tmp_path):
    costs = run(lab, tmp_path)[1]
    timed = {name: list(cost.get("timed", {})) for name, cost in costs.items()}
    assert timed == {
        "teacher": ["instructions", "reasoning"],
        "system1_before": [],
        "system1": ["instructions"],
        "system2_before": [],
        "system2": ["reasoning"],
    }
    found = costs["system2"]["timed"]["reasoning"]
    assert [len(of) for of in found["first_sec"]] == [len(of) for of in found["alone_sec"]] == [2, 2]
    assert all(0 < tokens <= 3 for tokens in found["alone_tokens"])
    assert len(found["load_sec"]) == 2 and found["load_tokens"] <= 9 and found["load_prompts"] == 3


@pytest.mark.slow
def test_each_model_is_loaded_once_and_a_second_run_asks_none_of_them_again(lab, tmp_path, monkeypatch):
    loaded: list[str] = []
    load = contender.load_teacher
    monkeypatch.setattr(contender, "load_teacher", lambda *args: loaded.append(args[0]) or load(*args))
    first, _ = run(lab, tmp_path)
    assert len(loaded) == len(set(loaded)) == 5

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a stored answer was asked again")

    monkeypatch.setattr(measure, "_time", lambda *args: None)
    monkeypatch.setattr("distill_app.generation.in_process.stream_answers", refuse)
    assert run(lab, tmp_path)[0] == first


def prompt_of(one: Candidate, task: str) -> str:
    record = {"instruction": "Add 2 and 3.", "input": "", "output": "5"}
    opened = open_contender(one, params_of(), label_params())
    return opened.prompt(task, record)


def test_a_student_is_asked_as_it_was_trained_and_all_others_in_their_own_chat_format(lab):
    teacher, before = (
        Candidate("teacher", str(lab / "teacher")),
        Candidate("system2_before", str(lab / "before2")),
    )
    assert prompt_of(teacher, "instructions").startswith("<s>user\nAdd 2 and 3.</s>")
    assert "step by step" not in prompt_of(teacher, "instructions")
    assert "step by step" in prompt_of(teacher, "reasoning")
    assert prompt_of(before, "reasoning") == prompt_of(teacher, "reasoning")
    student = Candidate("system2", str(lab / "models/system2"), "system2")
    assert prompt_of(student, "reasoning") == "User: Add 2 and 3.\nThink step by step.\nAssistant:"


def test_a_teacher_behind_a_server_is_compared_without_weights_or_with_weights_that_are_named(lab):
    served = label_params(engine="openai", base_url="http://localhost:1/v1", teacher="big", revision="v2")
    hosted = models_of(lab, params_of(), served)[0]
    assert (hosted.model, hosted.base_url, hosted.revision) == ("big", "http://localhost:1/v1", "v2")
    chosen = models_of(lab, params_of(teacher="a/b"), served)[0]
    assert (chosen.model, chosen.base_url, chosen.revision) == ("a/b", None, None)


def test_the_teacher_is_loaded_as_it_would_be_served_not_as_it_labelled(lab):
    label = label_params(teacher="big", quantization="8bit")
    assert models_of(lab, params_of(), label)[0].quantization == "none"
    assert models_of(lab, params_of(teacher_quantization="4bit"), label)[0].quantization == "4bit"


def test_with_servers_every_model_needs_an_address(lab):
    with pytest.raises(
        ValueError, match=r"measure\.servers: found no system1, expected its server's address"
    ):
        params = params_of(engine="openai", servers={"teacher": "http://localhost:1/v1"})
        open_contender(Candidate("system1", str(lab / "models/system1"), "system1"), params, label_params())


def test_a_student_that_is_not_whole_is_told_before_any_model_is_asked(lab, tmp_path):
    shutil.copytree(lab / "models", tmp_path / "models")
    (tmp_path / "models/system2/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"system2: no \*\.safetensors file"):
        compared_models(label_params(), params_of(), "a/b", "a/b", str(tmp_path / "models"))


def test_models_are_asked_at_the_revisions_of_the_params(lab):
    params = params_of(teacher="org/teacher", teacher_revision="t")
    before = ("org/one", "org/two", str(lab / "models"))
    models = compared_models(label_params(), params, *before, system1_revision="a", system2_revision="b")
    found = {model.name: model.revision for model in models}
    assert found == {
        "teacher": "t",
        "system1_before": "a",
        "system1": None,
        "system2_before": "b",
        "system2": None,
    }


@pytest.mark.parametrize(
    ("judge", "revision", "expected"),
    [("org/judge", "j", "j"), ("org/judge", None, None), ("org/t", "j", "j"), ("org/t", None, "t")],
)
def test_a_judge_is_opened_at_its_revision_else_as_the_labelling_teacher(
    monkeypatch, judge, revision, expected
):
    opened: list[LabelParams] = []
    monkeypatch.setattr("distill_app.labeling.judge.open_engine", opened.append)
    params = params_of(judge=judge, judge_revision=revision)
    measure._open_judge(params, label_params(teacher="org/t", revision="t"))
    assert opened[0].revision == expected


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


@pytest.mark.slow
def test_a_prompt_too_long_for_a_student_is_no_instant_answer(lab, tmp_path):
    long, short = "Say it again. " * 40, ["Say 1", "Say 2"]
    lab = with_instructions(lab, tmp_path, [long, *short])
    short_student(lab, 120)
    answers, costs = run(lab, tmp_path / "reports", fidelity_prompts=3)
    refused = {row["prompt"]: row["system1"]["refused"] for row in answers["instructions"]}
    assert refused == {long.strip(): True, "Say 1": False, "Say 2": False}
    for row in answers["instructions"]:
        assert row["forced"] is None or not row["system1"]["refused"]
    assert any(row["forced"] for row in answers["instructions"])
    for name in ("teacher", "system1"):  # timed are the prompts that all could read
        timed = costs[name]["timed"]["instructions"]
        assert [len(of) for of in timed["alone_sec"]] == [2, 2] and timed["load_prompts"] == 2


def test_without_a_prompt_that_all_could_read_no_time_is_made_up(lab, tmp_path):
    lab = with_instructions(lab, tmp_path, ["Say it again. " * 40])
    short_student(lab, 120)
    costs = run(lab, tmp_path / "reports")[1]
    assert "instructions" not in costs["teacher"]["timed"] and "reasoning" in costs["teacher"]["timed"]


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

    monkeypatch.setattr(contender, "load_teacher", refuse)
    with pytest.raises(ValueError, match=message):
        run(lab, tmp_path, **{"judge": "big", **changes})


def test_a_judge_behind_a_server_goes_with_labelling_on_ray(lab):
    label = label_params(engine_workers=4, ray_address="head:6379")
    params = params_of(judge="big", judge_engine="openai", judge_base_url="http://localhost:1/v1")
    with measure._open_judge(params, label) as judge:
        assert judge is not None and judge.teacher == "big"


@pytest.mark.slow
def test_a_judge_says_how_system_1_does_against_its_teacher_and_against_itself_before(lab, tmp_path):
    answers, _ = run(lab, tmp_path, judge=str(lab / "teacher"))
    for row in answers["instructions"]:
        assert not any("judged" in row[name] for name in ASKED["instructions"] if name != "system1")
        assert set(row["system1"]["judged"]) == {"teacher", "before"}
        for ways in row["system1"]["judged"].values():
            assert len(ways) == 2 and set(ways) <= {"won", "lost", "tied", "unread"}


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_written_report(lab, tmp_path):
    code = (
        "import os, signal, sys; sys.path[:0] = sys.argv[3:]\n"
        "import pathlib, test_evaluation_measure as t\n"
        "from distill_app.evaluation.asking import measure\n"
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
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
    run(lab, tmp_path)
    assert (tmp_path / "answers.json").is_file()


def served(lab: Path, monkeypatch: pytest.MonkeyPatch) -> LabelParams:
    """Labels of a teacher behind a server, which is a tiny model here."""
    model, tokenizer = load_student(str(lab / "teacher"))

    def generate(self: Endpoint, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        texts = [json.loads(prompt)[-1]["content"] for prompt in prompts]
        yield from stream_answers(model, tokenizer, texts, sampling)

    monkeypatch.setattr(Endpoint, "generate", generate)
    return label_params(teacher="big", engine="openai", base_url="http://localhost:1/v1")


@pytest.mark.slow
def test_a_hosted_teacher_has_answers_and_times_and_what_needs_weights_is_left_out_in_words(
    lab, tmp_path, monkeypatch, capsys
):
    label = served(lab, monkeypatch).model_copy(update={"store": str(tmp_path / "store")})
    params = params_of()
    measure_models(models_of(lab, params, label), params, label, str(lab / "data"), str(tmp_path))
    answers, costs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("answers", "costs"))
    assert "no fidelity, since the teacher is a server's" in capsys.readouterr().err
    for row in answers["instructions"]:
        assert "forced" not in row and "free" not in row and row["teacher"]["tokens"] > 0
    assert set(costs["teacher"]["timed"]) == {"instructions", "reasoning"}
    assert costs["teacher"]["engine"] == "openai" and "parameters" not in costs["teacher"]
    assert costs["system1"]["engine"] == "transformers"

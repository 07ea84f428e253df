"""The benchmarks through the real lm-eval, on tiny random models and task files of a test's own."""

import errno
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import yaml

from distill_app.core.models import load_student, load_tokenizer, set_chat_template
from distill_app.core.prompts import chat_template, format_prompt, format_response
from distill_app.evaluation import candidates
from distill_app.evaluation.benchmarks import run, tasks
from distill_app.evaluation.benchmarks.params import BenchmarkParams, TaskParams
from distill_app.evaluation.benchmarks.run import run_benchmarks
from distill_app.evaluation.candidates import TeacherParams
from distill_app.generation.answers import Answer
from distill_app.generation.endpoint import Endpoint
from distill_app.labeling.params import LabelParams

ROOT = Path(__file__).parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
ROLES = ["teacher", "system1_before", "system1", "system2_before", "system2"]
QUESTIONS = [
    {"question": "What barks?", "choices": ["dog", "tree", "cup", "sky"], "answer": 0},
    {"question": "What is 4 * 6?", "choices": ["19", "24"], "answer": 1},
    {"question": "Which fruit is red?", "choices": ["the fox", "strawberries", "cherries"], "answer": 2},
    {"question": "What does the fox jump over?", "choices": ["a pen", "the lazy dog"], "answer": 1},
    {"question": "Who thinks?", "choices": ["User", "Assistant", "Step"], "answer": 0},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"a benchmark of one's own reached for the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model_dir):
    """Folders of a teacher, two students and System 1's start; System 2's start is the teacher's copy."""
    from conftest import make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("system1", "system2", "base1")):
        make_tiny_model(folder / name, seed=number + 1)
    set_chat_template(folder / "system1", chat_template("system1"))
    shutil.copytree(tiny_model_dir, folder / "base2")
    shutil.copytree(tiny_model_dir, folder / "teacher")
    return folder


def write_task(folder: Path, name: str = "mine", rows: list | None = None, **changes: object) -> Path:
    """Write a task file with its questions; a change to None takes a key out."""
    folder = folder / "tasks" / name
    folder.mkdir(parents=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or QUESTIONS))
    task = yaml.safe_load((ROOT / "data/tasks/everyday/everyday.yaml").read_text())
    task["task"] = name
    task["dataset_kwargs"]["data_files"]["test"] = str(folder / "questions.jsonl")
    task = {key: value for key, value in {**task, **changes}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def benchmark(
    models: Path, folder: Path, label: dict | None = None, teacher: str | None = None, **changes
) -> dict:
    params = {**PARAMS["benchmark"], "tasks": ["mine"], "task_dir": str(folder / "tasks"), **changes}
    return run_benchmarks(
        BenchmarkParams.model_validate(params),
        label=LabelParams.model_validate(
            {**PARAMS["label"], "teacher": str(models / "teacher"), **(label or {})}
        ),
        teacher=TeacherParams(teacher=teacher, teacher_revision=None, teacher_quantization="none"),
        system1_before=str(models / "base1"),
        system2_before=str(models / "base2"),
        models_dir=str(models),
        log_path=str(folder / "benchmark.log"),
    )


def loglikelihood(model, tokenizer, prompt: str, continuation: str) -> float:
    """Return the log-probability of the continuation, one sequence at a time and without padding."""
    import torch

    head = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + continuation)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(head) - 1 : -1].double()
    target = torch.tensor(ids[len(head) :])
    return logits.log_softmax(-1).gather(1, target[:, None]).sum().item()


def right_answers(folder: Path, template: str, delimiter: str) -> int:
    model, tokenizer = load_student(str(folder))
    right = 0
    for row in QUESTIONS:
        prompt = template.format(row["question"])
        found = [loglikelihood(model, tokenizer, prompt, delimiter + choice) for choice in row["choices"]]
        best, second = sorted(found, reverse=True)[:2]
        assert best - second > 0.01  # else the reference could not tell
        right += found.index(best) == row["answer"]
    return right


@pytest.mark.slow
def test_compared_models_are_scored_as_a_plain_reference_scores_them(models, tmp_path):
    write_task(tmp_path)
    result = benchmark(models, tmp_path)["mine"]
    assert set(result) == {
        "metric",
        "filter",
        "questions",
        "chance",
        "higher_is_better",
        "settings",
        "models",
        "scores",
        "all_metrics",
    }
    assert set(result["all_metrics"]["teacher"]) == {"acc,none", "acc_norm,none"}
    for name in ROLES:  # question by question, so that models are compared paired
        assert len(result["scores"][name]) == 5
        assert sum(result["scores"][name]) / 5 == pytest.approx(result["models"][name]["value"])
    assert (result["metric"], result["questions"]) == ("acc", 5)
    assert result["chance"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 3 + 1 / 2 + 1 / 3) / 5, abs=1e-6)
    assert list(result["models"]) == ROLES
    template = "Question: {}\nAnswer:"
    places = dict(zip(ROLES, ("teacher", "base1", "system1", "base2", "system2"), strict=True))
    expected = {role: right_answers(models / place, template, " ") / 5 for role, place in places.items()}
    assert {role: found["value"] for role, found in result["models"].items()} == expected
    assert len(set(expected.values())) > 1  # else any mix-up of models would pass
    for found in result["models"].values():
        assert 0 <= found["low"] < found["high"] <= 1


@pytest.fixture
def answers(monkeypatch):
    """What lm-eval gave for each model that was asked, in order, with the requests left in its tasks."""
    import lm_eval

    given = []

    def spy(**options):
        result = evaluate(**options)
        requests = {name: task.instances for name, task in options["task_dict"]["tasks"].items()}
        given.append((result, {name: [r.args for r in found] for name, found in requests.items()}))
        return result

    evaluate = lm_eval.evaluate
    monkeypatch.setattr(lm_eval, "evaluate", spy)
    return given


@pytest.mark.slow
def test_choices_are_told_apart_finer_than_bfloat16_has_logarithms(models, tmp_path, answers):
    write_task(tmp_path)
    benchmark(models, tmp_path, batch_size=1)
    model, tokenizer = load_student(str(models / "teacher"))
    for sample in answers[0][0]["samples"]["mine"]:
        for (prompt, choice), found in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            assert found[0] == pytest.approx(loglikelihood(model, tokenizer, prompt, choice), abs=1e-3)


@pytest.mark.slow
def test_two_runs_give_the_same_bytes_and_no_path_is_in_them(models, tmp_path):
    write_task(tmp_path)
    first, second = (json.dumps(benchmark(models, tmp_path)) for _ in range(2))
    assert first == second
    assert str(tmp_path) not in first
    assert str(models) not in first


def test_models_of_the_same_bytes_are_loaded_once_and_each_is_freed_before_the_next(
    models, tmp_path, monkeypatch, capfd
):
    write_task(tmp_path)
    loaded: list[tuple[str, weakref.ref]] = []

    def load(name, quantization, revision):
        assert not [old for old, model in loaded if model() is not None]
        model, tokenizer = load_student(name)
        loaded.append((Path(name).name, weakref.ref(model)))
        return model, tokenizer

    monkeypatch.setattr(run, "load_teacher", load)
    result = benchmark(models, tmp_path)["mine"]["models"]
    assert [name for name, _ in loaded] == ["teacher", "base1", "system1", "system2"]
    assert result["system2_before"] == result["teacher"]
    assert "system2_before: mine acc" in capfd.readouterr().err


@pytest.mark.slow
def test_the_stage_tells_its_progress_and_lm_eval_only_the_log(models, tmp_path, monkeypatch, capfd):
    write_task(tmp_path)
    monkeypatch.setattr(run, "REPORT_EVERY_SEC", -1.0)
    benchmark(models, tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("benchmark: ") for line in lines)
    assert "benchmark: system2: 14 of 14 answers, about 0 s left" in lines
    assert "loglikelihood" in (tmp_path / "benchmark.log").read_text()


def test_a_limit_takes_the_first_questions_and_their_chance(models, tmp_path):
    write_task(tmp_path)
    result = benchmark(models, tmp_path, limit=2)["mine"]
    assert (result["questions"], result["chance"]) == (2, 0.375)


@pytest.mark.slow
def test_with_chat_templates_each_model_is_asked_in_its_own_format(models, tmp_path):
    """A student trained on "Assistant: dog" is not scored on "Assistant:dog"."""
    write_task(tmp_path, doc_to_text="{{question}}")
    for name in ("system2", "base1", "base2", "teacher"):
        assert load_tokenizer(str(models / name)).chat_template
    found = benchmark(models, tmp_path, apply_chat_template=True)["mine"]["models"]
    space = format_response("x")[0]
    assert found["system1"]["value"] == right_answers(models / "system1", format_prompt("{}"), space) / 5
    template = "<s>user\n{}</s>\n<s>assistant\n"
    assert found["teacher"]["value"] == right_answers(models / "teacher", template, "") / 5


def test_a_model_without_a_chat_template_is_told_before_any_is_asked(models, tmp_path, tiny_copy):
    config = json.loads((tiny_copy / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (tiny_copy / "tokenizer_config.json").write_text(json.dumps(config))
    write_task(tmp_path)
    with pytest.raises(ValueError, match="no chat template in it; set apply_chat_template to false"):
        benchmark(models, tmp_path, teacher=str(tiny_copy), apply_chat_template=True)


@pytest.fixture
def small_index(monkeypatch):
    """lm-eval without its own 14,000 tasks, which take it 10 seconds to find."""
    import lm_eval.tasks

    index = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **options: index(include_path=options["include_path"])
    )


@pytest.mark.slow
def test_a_group_with_a_score_stands_for_its_tasks_and_one_without_for_none(models, tmp_path, small_index):
    write_task(tmp_path)
    write_task(tmp_path, "more", QUESTIONS[:3])
    group = {"group": "both", "task": ["mine", "more"]}
    scored = {**group, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "tasks/both.yaml").write_text(yaml.safe_dump(scored))
    (tmp_path / "tasks/loose.yaml").write_text(yaml.safe_dump({**group, "group": "loose"}))
    result = benchmark(models, tmp_path, tasks=["both"])
    alone = benchmark(models, tmp_path, tasks=["loose"])
    assert list(result) == ["both"]
    assert list(alone) == ["mine", "more"]
    assert (result["both"]["questions"], result["both"]["chance"]) == (8, None)
    for role in ROLES:
        shares = [alone[name]["models"][role]["value"] for name in ("mine", "more")]
        pooled = (5 * shares[0] + 3 * shares[1]) / 8
        assert result["both"]["models"][role]["value"] == pytest.approx(pooled, abs=1e-6)


@pytest.mark.slow
def test_a_task_whose_answers_are_written_is_scored_by_exact_match(models, tmp_path):
    rows = [
        {"question": "Which fruit is red?", "answer": "cherries"},
        {"question": "What barks?", "answer": "dog"},
    ]
    write_task(
        tmp_path,
        rows=rows,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    )
    result = benchmark(models, tmp_path)["mine"]
    assert (result["metric"], result["questions"], result["chance"]) == ("exact_match", 2, None)
    assert result["models"]["teacher"]["value"] == 0.0
    assert result["models"]["teacher"]["high"] == pytest.approx(0.657620, abs=1e-6)  # Wilson, 0 of 2


@pytest.mark.slow
def test_a_perplexity_has_no_interval_where_lm_eval_knows_none(models, tmp_path):
    write_task(
        tmp_path,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_choice=None,
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    found = benchmark(models, tmp_path)["mine"]["models"]["teacher"]
    assert found["value"] > 1
    assert (found["low"], found["high"]) == (None, None)


@pytest.mark.slow
def test_a_standard_error_that_lm_eval_draws_gives_an_interval_and_prints_nothing(models, tmp_path, capfd):
    write_task(
        tmp_path,
        output_type="loglikelihood",
        doc_to_choice=None,
        doc_to_target="{{choices[answer]}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    result = benchmark(models, tmp_path)["mine"]
    assert (result["metric"], result["chance"]) == ("perplexity", None)
    for found in result["models"].values():
        assert found["low"] < found["value"] < found["high"]
    assert capfd.readouterr().out == ""


def test_solved_examples_stand_before_the_question_where_they_are_asked_for(models, tmp_path, answers):
    write_task(tmp_path, num_fewshot=None)
    benchmark(models, tmp_path, num_fewshot=2)
    prompts = [[prompt for prompt, _ in requests["mine"]] for _, requests in answers]
    assert {prompt.count("Answer:") for prompt in prompts[0]} == {3}
    assert prompts == prompts[:1] * 4  # the same examples for every model


def test_a_task_that_wants_no_solved_examples_gets_none(models, tmp_path, answers):
    write_task(tmp_path, num_fewshot=0)
    benchmark(models, tmp_path, num_fewshot=2)
    assert {prompt.count("Answer:") for prompt, _ in answers[0][1]["mine"]} == {1}


def test_without_tasks_nothing_is_loaded_and_the_result_is_empty(tmp_path):
    """No model is there at all, and the teacher is a server's."""
    params = {**PARAMS, "benchmark": {**PARAMS["benchmark"], "tasks": [], "task_dir": "nowhere"}}
    params["label"] = {**PARAMS["label"], "engine": "openai", "base_url": "http://localhost:1/v1"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    code = (
        "import sys; from stages.benchmark import main; main();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lm_eval', 'datasets')))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "reports/benchmarks.json").read_text() == "{}\n"


@pytest.mark.slow
def test_the_stage_writes_what_the_benchmarks_give(models, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from stages import benchmark as stage

    write_task(tmp_path)
    params = {**PARAMS, "benchmark": {**PARAMS["benchmark"], "tasks": ["mine"], "task_dir": "tasks"}}
    params["label"] = {**PARAMS["label"], "teacher": "models/teacher"}
    params["train_s1"] = {**PARAMS["train_s1"], "student": "models/base1"}
    params["train_s2"] = {**PARAMS["train_s2"], "student": "models/base2"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    stage.main()
    assert json.loads((tmp_path / "reports/benchmarks.json").read_text()) == benchmark(models, tmp_path)
    assert capsys.readouterr().out == "benchmark: mine -> reports/benchmarks.json\n"


@pytest.mark.slow
def test_a_teacher_behind_a_server_is_left_out_in_words_unless_its_weights_are_named(
    models, tmp_path, capsys
):
    write_task(tmp_path)
    server = {"engine": "openai", "teacher": "served", "base_url": "http://localhost:1/v1"}
    found = benchmark(models, tmp_path, label=server)
    assert list(found["mine"]["models"]) == ROLES[1:] and list(found["mine"]["scores"]) == ROLES[1:]
    assert "benchmark: teacher: mine left out: they ask how likely given texts are" in capsys.readouterr().err
    found = benchmark(models, tmp_path, label=server, teacher=str(models / "teacher"))
    assert list(found["mine"]["models"]) == ROLES


@pytest.mark.slow
def test_a_teacher_behind_a_server_is_asked_what_it_writes_itself_once_and_up_to_the_stop(
    models, tmp_path, monkeypatch, capsys
):
    asked: list[list[dict]] = []

    def generate(self, prompts, sampling):
        for place, prompt in enumerate(prompts):
            asked.append(json.loads(prompt))
            yield place, Answer("24\nQ: And what is more?", 9, "stop", 5)
        assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 32)

    monkeypatch.setattr(Endpoint, "generate", generate)
    writes = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32},
        "metric_list": [{"metric": "exact_match"}],
    }
    write_task(tmp_path)
    write_task(tmp_path, "written", **writes)
    server = {
        "engine": "openai",
        "teacher": "served",
        "base_url": "http://localhost:1/v1",
        "store": str(tmp_path / "store"),
    }
    tasks_ = ["mine", {"task": "written", "apply_chat_template": False}]
    found = benchmark(models, tmp_path, label=server, tasks=tasks_)
    assert list(found["mine"]["models"]) == ROLES[1:] and list(found["written"]["models"]) == ROLES
    assert found["written"]["scores"]["teacher"] == [0, 1, 0, 0, 0]  # 24 is right of the second question
    assert len(asked) == len(QUESTIONS) and asked[0][-1]["role"] == "user"
    assert "What barks?" in asked[0][-1]["content"]
    assert benchmark(models, tmp_path, label=server, tasks=tasks_) == found
    assert len(asked) == len(QUESTIONS)  # they lie in the store
    chat = [{"task": "written", "apply_chat_template": True}]
    shutil.copytree(models, tmp_path / "models")
    for name in ("base1", "base2", "system2"):
        set_chat_template(tmp_path / "models" / name, chat_template("system1"))
    found = benchmark(tmp_path / "models", tmp_path, label=server, tasks=chat)
    assert found["written"]["scores"]["teacher"] == [0, 1, 0, 0, 0]


def test_a_student_that_is_not_there_is_told_before_any_model_is_asked(models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("system2"))
    monkeypatch.setattr(run, "load_teacher", None)
    write_task(tmp_path)
    with pytest.raises(FileNotFoundError, match="system2: no such model folder"):
        benchmark(tmp_path / "models", tmp_path)


def load_own(tmp_path: Path, *names: str) -> list[tasks.Benchmark]:
    return tasks.load_benchmarks([TaskParams(task=n) for n in names or ["mine"]], str(tmp_path / "tasks"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{qestion}}"}, "UndefinedError: 'qestion' is undefined"),
        ({"doc_to_choice": "{{choices"}, "mine.yaml: cannot be loaded"),
        ({"output_type": "multiple_guess"}, "invalid output_type 'multiple_guess'"),
        ({"test_split": "tset"}, "mine.yaml: cannot be loaded .KeyError"),
        ({"test_split": None}, "must have valid or test docs"),
        ({"metric_list": [{"metric": "accc"}]}, "mine.yaml: cannot be loaded"),
        ({"unsafe_code": True}, "such tasks are not run here"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
    ],
)
def test_a_faulty_task_file_is_told_in_one_line(tmp_path, changes, message):
    write_task(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as told:
        load_own(tmp_path)
    assert "\n" not in str(told.value)
    assert "mend it or the questions that it names" in str(told.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "a?", "choices": ["b", "c"], "answer": 2}', "question 5: answer 2 is none of its 2"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": -1}', "question 5: answer -1 is none of its 2"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": "d"}', "question 5: answer 'd' is none of its"),
        ('{"question": "a?", "choices": ["b", null], "answer": 0}', "question 5: .*None.*expected texts"),
        ('{"question": "a?", "choices": ["", "b"], "answer": 0}', "question 5: .*expected texts"),
        ('{"question": "a?", "answer": 0}', "question 5: .*NoneType"),
        ('{"question": "a?", "choices": ["b", ', "mine.yaml: cannot be loaded"),
        ("\xff\xfe", "mine.yaml: cannot be loaded"),
    ],
)
def test_a_faulty_question_is_told_in_one_line(tmp_path, row, message):
    with (write_task(tmp_path) / "questions.jsonl").open("ab") as file:
        file.write(row.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=message) as told:
        load_own(tmp_path)
    assert "\n" not in str(told.value)


def test_a_file_without_questions_is_told(tmp_path):
    (write_task(tmp_path) / "questions.jsonl").write_text("")
    with pytest.raises(ValueError, match="mine.yaml: cannot be loaded"):
        load_own(tmp_path)


def test_an_edited_question_is_read_even_if_the_files_time_is_the_old_one(tmp_path):
    path = write_task(tmp_path) / "questions.jsonl"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    load_own(tmp_path)
    path.write_text(path.read_text().replace("barks", "purrs"))
    os.utime(path, ns=times)
    assert load_own(tmp_path)[0].tasks[0].eval_docs[0]["question"] == "What purrs?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [1,\n", "odd.yaml: not YAML"),
        ("- task\n", "odd.yaml: found no keys"),
        ("task: mine\n", "odd.yaml: task mine is that of .*mine.yaml too; rename one of them"),
    ],
)
def test_a_task_file_that_the_harness_would_pass_over_in_silence_is_told(tmp_path, content, message):
    write_task(tmp_path)
    (tmp_path / "tasks/odd.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_own(tmp_path)


def test_a_task_that_is_not_there_is_told_with_the_nearest_name(tmp_path, small_index):
    write_task(tmp_path)
    with pytest.raises(ValueError, match=r"benchmark\.tasks: mien: no such task in .*did you mean mine\?"):
        load_own(tmp_path, "mine", "mien")
    with pytest.raises(ValueError, match="xxxxxx: no such task in .*`lm-eval ls tasks` lists"):
        load_own(tmp_path, "xxxxxx")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        tasks.load_benchmarks([TaskParams(task="mine")], "nowhere")


def test_a_task_whose_questions_lie_on_the_hub_is_told_offline(tmp_path):
    write_task(tmp_path, dataset_path="someone/questions", dataset_kwargs=None)
    with pytest.raises(
        OSError, match="mine: cannot be had .*check the network .*HF_TOKEN .*take a task whose"
    ):
        load_own(tmp_path)


def test_a_full_disk_is_not_told_as_a_faulty_task(tmp_path, monkeypatch):
    import lm_eval.tasks

    def load(manager, names):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as err:
            raise RuntimeError("An error occurred while generating the dataset") from err

    write_task(tmp_path)
    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
    with pytest.raises(OSError, match="mine: OSError: .*No space left on device; check the disk and HF_HOME"):
        load_own(tmp_path)


def test_the_stage_reruns_for_the_params_that_name_the_teacher():
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["benchmark"]
    source = re.sub(r'"[^"]*"', "", inspect.getsource(candidates._teacher))
    used = {f"label.{name}" for name in re.findall(r"\blabel\.(\w+)", source)}
    assert {name for name in graph["params"] if name.startswith("label.")} == used
    assert {"benchmark", "measure.teacher", "train_s1.student", "train_s2.student"} <= set(graph["params"])


@pytest.mark.full
def test_the_harness_own_tasks_are_found_by_name(tmp_path):
    (tmp_path / "tasks").mkdir()
    with pytest.raises(ValueError, match="did you mean arc_easy"):
        load_own(tmp_path, "arc_esy")
    with pytest.raises(OSError, match="arc_easy: cannot be had .*HF_HUB_OFFLINE"):
        load_own(tmp_path, "arc_easy")


def test_a_task_has_settings_of_its_own_beside_those_of_all(models, tmp_path):
    write_task(tmp_path)
    write_task(tmp_path, "other")
    own = {"task": "other", "limit": 2, "metric": "acc_norm", "apply_chat_template": True}
    found = benchmark(models, tmp_path, tasks=["mine", own])
    assert (found["mine"]["questions"], found["other"]["questions"]) == (5, 2)
    assert (found["mine"]["metric"], found["other"]["metric"]) == ("acc", "acc_norm")
    assert found["other"]["settings"]["apply_chat_template"] is True
    assert found["mine"]["settings"]["apply_chat_template"] is False


def test_public_tasks_are_run_as_tables_show_them_unless_one_says_otherwise():
    params = BenchmarkParams.model_validate(
        {
            **PARAMS["benchmark"],
            "tasks": ["gsm8k", {"task": "gsm8k", "filter": "strict-match", "max_gen_toks": 64}],
        }
    )
    as_shown, changed = params.settings()
    assert (as_shown.filter, as_shown.max_gen_toks) == ("flexible-extract", 1024)
    assert (changed.filter, changed.max_gen_toks, changed.metric) == ("strict-match", 64, "exact_match")


def test_a_metric_that_a_task_does_not_give_is_told_with_those_that_it_gives(models, tmp_path):
    write_task(tmp_path)
    with pytest.raises(
        ValueError, match=r"mine: no f1 came out of it, but acc,none, acc_norm,none; take one"
    ):
        benchmark(models, tmp_path, tasks=[{"task": "mine", "metric": "f1"}])

"""EasyDistill's labelling jobs: what lacks an answer is asked once, and no file of the config's is touched."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from fakes import Echo
from test_generation_endpoint import KEY, Proxy, completion, error

from distill_app import read_json, save_json
from distill_app.core.errors import EmptyDataError, EngineGone
from distill_app.core.files import read_records, save_records
from distill_app.core.logits import TopLogits
from distill_app.easydistill.config import write_system1_config
from distill_app.easydistill.job import JOBS, LABELING_JOBS, Dataset, Models
from distill_app.generation.engines import open_engine
from distill_app.generation.vllm_process import VllmProcess
from distill_app.labeling import job
from distill_app.labeling.job import label_job, read_label_job

LOCAL = {
    "temperature": 0.8,
    "seed": 777,
    "max_new_tokens": 8,
    "max_model_len": 4096,
    "enable_chunked_prefill": True,
    "gpu_memory_utilization": 0.9,
    "enforce_eager": False,
    "trust_remote_code": True,
}
CONTRACT = {  # EasyDistill 1.0: its examples' keys
    "kd_black_box_local": LOCAL,
    "kd_white_box": {**LOCAL, "top_logits_num": 10},
    "kd_black_box_api": {
        "base_url": "http://localhost:1/v1",
        "api_key": "TOKEN",
        "stream": True,
        "system_prompt": "Be brief.",
        "temperature": 0.8,
        "seed": 777,
        "max_new_tokens": 8,
    },
}
OURS = {"engine", "top_p"}
OLD = [{"instruction": "say 1", "input": "3", "output": "one"}, {"instruction": "say 2", "output": "two"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def echo(monkeypatch):
    engine = Echo()
    monkeypatch.setattr(job, "open_engine", lambda params, options: engine)
    return engine


def no_engine(*arguments):
    raise AssertionError("an engine was opened")


@contextmanager
def serving(script):
    proxy = Proxy(script=script)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def instructions(*tokens: int) -> list[dict]:
    return [{"instruction": f"say {n}", "input": str(t), "output": "not read"} for n, t in enumerate(tokens)]


def write_job(labeled=None, asked=None, job_type="kd_black_box_local", teacher="t", **inference) -> str:
    for name, records in (("labeled", labeled), ("asked", asked)):
        if records is not None:
            Path(f"{name}.json").write_text(json.dumps(records))
    if job_type != "kd_black_box_api":
        inference = {"max_new_tokens": 8, **inference}
    config = {
        "job_type": job_type,
        "dataset": {"instruction_path": "asked.json", "labeled_path": "labeled.json"},
        "inference": inference,
        "models": {"teacher": str(teacher), "student": "s"},
        "training": {"output_dir": "out"},
    }
    Path("job.json").write_text(json.dumps(config))
    return "job.json"


def test_where_nothing_is_lacking_nothing_is_opened_and_the_records_are_copied(monkeypatch):
    monkeypatch.setattr(job, "open_engine", no_engine)
    asked = [{"instruction": " say 2\n"}, {"instruction": "say 1", "input": "3 "}]
    told = label_job(write_job(OLD, asked), "new/out.json")
    assert told == "label_job: 2 records were there, 0 labelled now, 0 dropped, all in new/out.json"
    assert read_json("new/out.json") == [{"input": "", **record} for record in OLD]
    assert sorted(os.listdir()) == ["asked.json", "job.json", "labeled.json", "new"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_jobs_files_have_the_format_that_their_names_end_in(monkeypatch, ending):
    monkeypatch.setattr(job, "open_engine", no_engine)
    old = [{"input": "", **record} for record in OLD]
    for name in ("labeled", "asked"):
        save_records(f"{name}{ending}", old)
    config = read_json(write_job())
    config["dataset"] = {"instruction_path": f"asked{ending}", "labeled_path": f"labeled{ending}"}
    save_json("job.json", config)
    label_job("job.json", f"out{ending}")
    assert read_records(f"out{ending}") == old


def test_what_is_lacking_is_asked_once_and_follows_in_the_order_of_the_instructions(echo):
    asked = [
        {"instruction": "say 1", "input": "3"},
        *instructions(5, 4, 2),
        {"instruction": "say 0", "input": "5"},
    ]
    told = label_job(write_job(OLD, asked), "out.json")
    assert "2 records were there, 4 labelled now, 0 dropped" in told
    written = read_json("out.json")
    assert [r["output"] for r in written[:2]] == ["one", "two"]
    assert [r["instruction"] for r in written[2:]] == ["say 0", "say 1", "say 2", "say 0"]
    assert written[3] == {"instruction": "say 1", "input": "4", "output": "say 1 4 at 0.8 in 4"}
    assert sorted(echo.asked) == ["say 0 5", "say 1 4", "say 2 2"]
    assert "3 asked" in Path("work/label.log").read_text()


def test_the_config_s_own_files_are_never_written(echo):
    path = write_job(OLD, instructions(5, 4))
    names = ("job.json", "labeled.json", "asked.json")
    before = [(Path(n).read_bytes(), Path(n).stat().st_mtime_ns) for n in names]
    label_job(path, "out.json")
    for name in names:
        with pytest.raises(
            ValueError, match=rf"{name}: a file that job\.json reads or writes, expected another"
        ):
            label_job(path, f"../{Path.cwd().name}/{name}")
    assert [(Path(n).read_bytes(), Path(n).stat().st_mtime_ns) for n in names] == before


def test_a_run_that_was_ended_goes_on_without_asking_twice(echo):
    path = write_job(None, instructions(*[3] * 12))

    def end_in_the_middle(prompt):
        if prompt.startswith("say 5"):
            raise KeyboardInterrupt

    echo.before_answer = end_in_the_middle
    with pytest.raises(KeyboardInterrupt):
        label_job(path, "out.json")
    assert not Path("out.json").exists()
    first, echo.asked = echo.asked, []
    echo.before_answer = lambda prompt: None
    assert "12 labelled now" in label_job(path, "out.json")
    assert len(set(first) | set(echo.asked)) == 12
    assert not {f"say {n} 3" for n in (0, 1, 2, 3, 6, 7)} & set(echo.asked)  # answered before the end
    echo.asked.clear()
    label_job(path, "out.json")
    assert echo.asked == []


def test_answers_not_worth_training_on_are_dropped_and_counted_by_reason(echo):
    told = label_job(write_job(OLD, instructions(5, 9, 0, -1, -1)), "out.json")
    assert told == (
        "label_job: 2 records were there, 1 labelled now, 4 dropped (1 empty, 1 truncated, 2 refused),"
        " all in out.json"
    )
    assert len(read_json("out.json")) == 3


def test_without_a_file_of_instructions_the_labelled_records_are_all(monkeypatch):
    monkeypatch.setattr(job, "open_engine", no_engine)
    assert "2 records were there" in label_job(write_job(OLD), "out.json")


def test_without_either_file_both_paths_are_named():
    with pytest.raises(FileNotFoundError, match=r"no file at labeled\.json .* nor asked\.json") as caught:
        label_job(write_job(), "out.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labeled", "asked", "says"),
    [([], None, "0 records were there"), (None, instructions(9, 0), r"2 dropped \(1 empty, 1 truncated\)")],
)
def test_nothing_to_train_on_is_told_and_nothing_is_written(echo, labeled, asked, says):
    with pytest.raises(EmptyDataError, match=f"nothing to train on: .*{says}"):
        label_job(write_job(labeled, asked), "out.json")
    assert not Path("out.json").exists()


@pytest.mark.parametrize(
    ("labeled", "says"),
    [
        ({"a": 1}, "labeled.json: found dict, expected a list"),
        (["x"], "labeled.json: record 0 is str, expected an object"),
        ([*OLD, {"instruction": "a"}], r'labeled.json: record 2 has no "output" \(keys: instruction\)'),
        ([{"instruction": "a", "input": None, "output": ""}], 'record 0: "input" is NoneType, expected text'),
    ],
)
def test_a_record_that_is_none_is_named(labeled, says):
    with pytest.raises(ValueError, match=says):
        label_job(write_job(labeled), "out.json")


def test_a_prompt_without_room_for_a_whole_answer_is_left_out_and_fits_in_a_longer_context(tiny_model_dir):
    asked = [{"instruction": "Name three"}, {"instruction": "again and " * 20}]
    path = write_job(OLD, asked, teacher=tiny_model_dir, temperature=0, max_model_len=60, max_new_tokens=20)
    assert "1 too long for max_model_len" in label_job(path, "out.json")
    path = write_job(OLD, asked, teacher=tiny_model_dir, temperature=0, max_new_tokens=20)
    assert "too long" not in label_job(path, "out.json")  # no refusal was stored


def test_a_white_box_job_writes_a_row_of_log_probabilities_for_each_record(tiny_model_dir):
    path = write_job(OLD, job_type="kd_white_box", teacher=tiny_model_dir, top_logits_num=3)
    label_job(path, "out.json", "logits.arrow")
    rows = TopLogits("logits.arrow")
    assert len(rows) == 2 and rows[0].ids.shape[1] == 3


def test_log_probabilities_need_a_place_and_a_job_that_has_them(tiny_model_dir):
    with pytest.raises(ValueError, match="kd_white_box writes log-probabilities; add --logits-out"):
        label_job(write_job(OLD, job_type="kd_white_box"), "out.json")
    with pytest.raises(ValueError, match=r"--logits-out: job\.json is no kd_white_box"):
        label_job(write_job(OLD), "out.json", "logits.arrow")
    with pytest.raises(ValueError, match=r"out\.json: a file that job\.json reads or writes"):
        label_job(write_job(OLD, job_type="kd_white_box"), "out.json", "out.json")
    path = write_job(OLD, job_type="kd_white_box", teacher=tiny_model_dir, top_logits_num=999)
    with pytest.raises(
        ValueError, match=r"job\.json: inference\.top_logits_num: found 999, expected at most"
    ):
        label_job(path, "out.json", "logits.arrow")


def test_an_api_job_sends_its_system_prompt_and_key_and_tells_the_key_nowhere(folder, capfd):
    asked = [{"instruction": "Name three"}, {"instruction": "Add", "input": "1 2"}]
    with serving(lambda body, number: completion()) as proxy:
        path = write_job(
            OLD,
            asked,
            "kd_black_box_api",
            base_url=proxy.url,
            api_key=KEY,
            system_prompt="Be brief.",
            stream=True,
        )
        print(label_job(path, "out.json"))
    assert [r["output"] for r in read_json("out.json")] == ["one", "two", "fine", "fine"]
    messages = sorted(json.dumps(body["messages"]) for body in proxy.bodies)
    system = {"role": "system", "content": "Be brief."}
    assert json.loads(messages[1]) == [system, {"role": "user", "content": "Name three"}]
    assert {body["model"] for body in proxy.bodies} == {"t"}
    assert {(body["max_tokens"], body["temperature"], body["top_p"]) for body in proxy.bodies} == {
        (512, 0.8, 1.0)
    }
    assert set(proxy.keys) == {f"Bearer {KEY}"}
    assert KEY not in "".join(capfd.readouterr())
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "job.json"]
    assert len(files) >= 5 and not [f for f in files if KEY.encode() in f.read_bytes()]


def test_another_system_prompt_is_another_question():
    with serving(lambda body, number: completion()) as proxy:
        for system_prompt, asked in (("", 1), ("", 1), ("Be brief.", 2), ("Be long.", 3)):
            path = write_job(
                None,
                [{"instruction": "a"}],
                "kd_black_box_api",
                base_url=proxy.url,
                system_prompt=system_prompt,
            )
            label_job(path, "out.json")
            assert len(proxy.bodies) == asked
    assert len(proxy.bodies[0]["messages"]) == 1


@pytest.mark.parametrize(
    "placeholder", ["", "TOKEN", "EMPTY", "your-api-key", "<key>", "${KEY}", "sk-xxxx", "..."]
)
def test_a_placeholder_leaves_the_key_to_the_environment(placeholder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    with serving(lambda body, number: completion()) as proxy:
        path = write_job(
            None, [{"instruction": "a"}], "kd_black_box_api", base_url=proxy.url, api_key=placeholder
        )
        label_job(path, "out.json")
    assert proxy.keys == ["Bearer sk-of-the-environment"]


def test_a_key_that_the_server_refuses_is_not_in_the_error(capfd):
    with serving(lambda body, number: error(401, f"no such key: {KEY}")) as proxy:
        path = write_job(None, [{"instruction": "a"}], "kd_black_box_api", base_url=proxy.url, api_key=KEY)
        with pytest.raises(EngineGone, match="401, the key in api_key was refused") as caught:
            label_job(path, "out.json")
    assert KEY not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("api_key", "says"),
    [([KEY], r"inference\.api_key: found list: "), (f"{KEY}\nx", "api_key: found characters that no header")],
)
def test_a_key_that_cannot_be_one_is_not_in_the_error(api_key, says):
    path = write_job(
        None, [{"instruction": "a"}], "kd_black_box_api", base_url="http://127.0.0.1:1/v1", api_key=api_key
    )
    with pytest.raises(ValueError, match=rf"job\.json: {says}") as caught:
        label_job(path, "out.json")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("job_type", CONTRACT)
def test_the_keys_are_those_of_the_contract(job_type):
    assert set(LABELING_JOBS) == set(CONTRACT)
    inference = JOBS[job_type].model_fields["inference"].annotation
    assert set(inference.model_fields) - OURS == set(CONTRACT[job_type])
    dataset = {"instruction_path", "labeled_path", "logits_path", "template", "seed"}
    assert set(Dataset.model_fields) - {"too_long"} == dataset
    assert set(Models.model_fields) - {"quantization", "student_revision", "teacher_revision"} == {
        "teacher",
        "student",
    }
    read = read_label_job(write_job(job_type=job_type, **CONTRACT[job_type]))
    assert read.inference.model_dump(exclude=OURS) == CONTRACT[job_type]


def test_a_config_that_this_project_wrote_is_a_labelling_job():
    options = {
        "dataset": {"too_long": "cut"},
        "models": {"quantization": "4bit"},
        "lora": {"r": 4},
        "validation": {"fraction": 0.1},
    }
    path = write_system1_config("job.json", teacher_model="t", student_model="s", extra=options)
    read = read_label_job(path)
    assert (read.dataset.too_long, read.models.quantization) == ("cut", "4bit")


@pytest.mark.parametrize("job_type", ["kd_black_box_local", "kd_white_box"])
def test_a_config_with_every_key_labels_in_process(job_type, tiny_model_dir):
    path = write_job(OLD, instructions(1), job_type, tiny_model_dir, **CONTRACT[job_type])
    logits = "logits.arrow" if job_type == "kd_white_box" else None
    assert label_job(path, "out.json", logits).startswith("label_job: 2 records were there")


@pytest.mark.parametrize(
    ("job_type", "inference", "says"),
    [
        ("kd_black_box_local", {"temprature": 1}, r"inference\.temprature: unknown key; did you mean temperature\?"),
        ("kd_black_box_local", {"base_url": "x"}, r"base_url: found in a job that .* expected in kd_black_box_api;"),
        ("kd_black_box_local", {"top_logits_num": 3}, r"top_logits_num: .* expected in kd_white_box; remove it"),
        ("kd_black_box_local", {"seed": "7"}, r"inference\.seed: found '7' \(str\): input should be"),
        ("kd_black_box_local", {"engine": "openai"}, r"inference\.engine: found 'openai'"),
        ("kd_black_box_local", {"max_model_len": 8}, r"max_model_len: found 8, expected more than inference\.max_new"),
        ("kd_black_box_local", {"engine": "vllm"}, r"job\.json: inference\.engine: vllm is not installed"),
        ("kd_black_box_api", {}, r"inference\.base_url: missing; add it"),
        ("kd_black_box_api", {"base_url": "ENDPOINT"}, r'job\.json: base_url: found "ENDPOINT", expected a URL'),
        ("kd_black_box_train_only", {}, "job_type: found 'kd_black_box_train_only', expected one that labels"),
        (["kd"], {}, r"job_type: found \['kd'\]"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_right_is_told_with_its_key(tiny_model_dir, job_type, inference, says):
    path = write_job(None, instructions(3), job_type, tiny_model_dir, **inference)
    with pytest.raises(ValueError, match=says) as caught:
        label_job(path, "out.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"dataset": {}}, r"dataset\.labeled_path: missing; add it"),
        ({"dataset": {"labelled_path": "a"}}, r"dataset\.labelled_path: unknown key; did you mean labeled_path\?"),
        ({"dataset": {"labeled_path": "a", "labels": "b"}}, r"dataset\.labels: unknown key; remove it"),
        ({"models": {"teacher": "a", "techer": "b"}}, r"models\.techer: unknown key; did you mean teacher\?"),
        ({"models": {"student": "a"}}, r"models\.teacher: missing; add it"),
        ({"models": "a"}, "models: found str, expected an object"),
    ],
)  # fmt: skip
def test_a_wrong_key_of_the_other_sections_is_told(section, says):
    path = Path(write_job(OLD))
    path.write_text(json.dumps({**json.loads(path.read_text()), **section}))
    with pytest.raises(ValueError, match=rf"job\.json: {says}"):
        label_job(str(path), "out.json")


def test_vllm_gets_its_own_keys_and_the_engine_in_process_none(tiny_model_dir, monkeypatch):
    monkeypatch.setattr("distill_app.generation.vllm_process.vllm_home", lambda: None)
    monkeypatch.setattr("distill_app.generation.identity._installed_version", lambda engine: "1")
    read = read_label_job(write_job(teacher=tiny_model_dir, engine="vllm", **LOCAL))
    given = {}
    monkeypatch.setattr(
        job, "open_engine", lambda params, options: given.update(options) or open_engine(params, options)
    )
    engine = job._open(read)
    assert isinstance(engine, VllmProcess)
    assert engine._arguments["engine_options"] == given == {k: LOCAL[k] for k in job.VLLM_KEYS}


def test_a_teacher_with_code_of_its_own_is_told(tiny_copy):
    config = json.loads((tiny_copy / "config.json").read_text())
    config |= {
        "model_type": "ours",
        "auto_map": {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"},
    }
    (tiny_copy / "config.json").write_text(json.dumps(config))
    path = write_job(None, instructions(3), teacher=tiny_copy, trust_remote_code=True)
    with pytest.raises(ValueError, match="needs code of its own, which is not run in process; take"):
        label_job(path, "out.json")


@pytest.mark.slow
def test_it_is_a_command_that_ends_in_one_line(tiny_model_dir):
    path = write_job(OLD, instructions(1), teacher=tiny_model_dir, temperature=0)
    command = [sys.executable, "-m", "distill_app.labeling", "--config", path, "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, "out.json"], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.startswith("label_job: 2 records were there, ") and run.stdout.count("\n") == 1
    run = subprocess.run(
        [*command, "asked.json"], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: asked.json: a file that job.json reads or writes")

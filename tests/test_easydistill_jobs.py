"""EasyDistill 1.0's own example configs, key by key: read, rendered, labelled where they label, and trained."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from fakes import Echo
from test_generation_endpoint import Proxy, ProxyHandler, as_json, completion
from trainings import OUT, curve, response_of, write_teacher

from distill_app import load_student, run_easy_distill
from distill_app.core.errors import EngineGone
from distill_app.core.files import read_records
from distill_app.easydistill import run
from distill_app.easydistill.job import JOBS, read_job
from distill_app.labeling.job import label_job
from distill_app.training.examples import build_examples, read_template
from distill_app.training.train import train_student

# As EasyDistill's own, chat_template_kd.jinja: its two renderings differ by a line break before the answer's
# head, and it ends an answer with the end of sequence and a stray dash
TEMPLATE = r"""{{'<s>system\nBe of help.</s>'}}
{{'<s>user\n' + message['content'] + '</s>'-}}
{% if add_generation_prompt %}
  {{'<s>assistant'-}}
{% endif %}
{% if add_output %}
  {{'<s>assistant\n' + message['output'] + '</s>-'}}
{% endif %}"""
ASKED = "<s>system\nBe of help.</s>\n<s>user\nName number 3.</s>\n  <s>assistant\n"
RECORDS = [{"instruction": f"Name number {n}.", "output": f"It is {n}."} for n in range(8)]
TRAINING = {
    "output_dir": OUT,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "max_length": 512,
    "save_steps": 1000,
    "logging_steps": 1,
    "learning_rate": 2e-5,
    "weight_decay": 0.05,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine",
}
LOCAL = {
    "enable_chunked_prefill": True,
    "seed": 777,
    "gpu_memory_utilization": 0.9,
    "temperature": 0.8,
    "trust_remote_code": True,
    "enforce_eager": False,
    "max_model_len": 4096,
    "max_new_tokens": 512,
}
WHITE_BOX = {"kd_ratio": 0.1, "max_seq_length": 512, "distillation_type": "forward_kld"}


def example(job_type: str, model: str, url: str = "ENDPOINT") -> dict:
    """Return EasyDistill's example of a job, with models and data that are here."""
    config = {
        "job_type": job_type,
        "dataset": {
            "instruction_path": "asked.json",
            "labeled_path": "labeled.json",
            "logits_path": "./logits.json",
            "template": "./template.jinja",
            "seed": 42,
        },
        "inference": LOCAL,
        "distillation": WHITE_BOX,
        "models": {"teacher": model, "student": model},
        "training": TRAINING,
    }
    if job_type == "kd_black_box_api":
        api = {"base_url": url, "api_key": "TOKEN", "stream": True, "system_prompt": "Be of help."}
        config["inference"] = {**api, "max_new_tokens": 512}
        del config["models"]["teacher"]
    if "white_box" in job_type:
        config["inference"] = {**config["inference"], "top_logits_num": 10}
    else:
        del config["distillation"], config["dataset"]["logits_path"]
    if job_type.endswith("train_only"):
        del config["inference"], config["dataset"]["instruction_path"]
        if "black" in job_type:
            del config["models"]["teacher"]
    return config


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with instructions, their labels and the template; what is a child process runs in this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("template.jinja").write_text(TEMPLATE)
    Path("asked.json").write_text(json.dumps([{"instruction": r["instruction"]} for r in RECORDS]))
    monkeypatch.setattr(run, "_run", here)


def here(command):
    module = command.index("-m")
    was, sys.argv = sys.argv, command[module + 1 :]
    try:
        name = "__main__" if command[module + 1].startswith("distill_app") else ""
        runpy.run_module(f"{command[module + 1]}.{name}", run_name="called")["main"]()
    finally:
        sys.argv = was


def write(config: dict) -> str:
    Path("job.json").write_text(json.dumps(config))
    return "job.json"


def check_trained(steps: int = 3) -> None:
    assert [step for step, _ in curve(OUT)] == list(range(1, steps + 1))
    provenance = json.loads(Path(OUT, "provenance.json").read_text())
    assert provenance["examples"]["train"] == len(RECORDS)


def test_each_of_its_job_types_is_known():
    assert set(JOBS) == {
        "kd_black_box_local",
        "kd_black_box_api",
        "kd_black_box_train_only",
        "kd_white_box",
        "kd_white_box_train_only",
    }


def test_kd_black_box_local_labels_what_is_lacking_and_trains(tiny_model_dir, monkeypatch):
    class Ten(Echo):
        def answer(self, prompt, sampling):
            return super().answer("5", sampling)

    monkeypatch.setattr("distill_app.labeling.job.open_engine", lambda params, options: Ten())
    Path("labeled.json").write_text(json.dumps(RECORDS[:6]))
    before = Path("labeled.json").read_bytes()
    assert run_easy_distill(write(example("kd_black_box_local", str(tiny_model_dir))), "builtin") == 0
    check_trained()
    assert Path("labeled.json").read_bytes() == before
    assert [r["output"] for r in read_records(f"work/{Path(OUT).name}_labeled.json")][5:] == [
        "It is 5.",
        *["5 at 0.8 in 5"] * 2,
    ]


def test_what_the_trainer_refuses_is_told_before_the_teacher_is_asked(tiny_model_dir, monkeypatch, capfd):
    asked = Echo()
    monkeypatch.setattr("distill_app.labeling.job.open_engine", lambda params, options: asked)
    config = example("kd_black_box_local", str(tiny_model_dir))
    config["training"] = {**TRAINING, "learning_rat": 1e-5}
    assert run_easy_distill(write(config), "builtin") == 1
    assert "training.learning_rat: unknown key; did you mean learning_rate?" in capfd.readouterr().err
    assert asked.asked == []


def test_kd_black_box_api_asks_the_model_that_its_server_names_and_trains(tiny_model_dir, monkeypatch):
    listed = as_json(
        200,
        {"object": "list", "data": [{"id": "first", "object": "model"}, {"id": "second", "object": "model"}]},
    )
    monkeypatch.setattr(ProxyHandler, "do_GET", lambda self: self.answer(*listed), raising=False)
    proxy = Proxy(script=lambda body, number: completion())
    config = example("kd_black_box_api", str(tiny_model_dir), proxy.url)
    assert run_easy_distill(write(config), "builtin") == 0
    check_trained()
    assert {body["model"] for body in proxy.bodies} == {"first"} and len(proxy.bodies) == len(RECORDS)
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (as_json(200, {"object": "list", "data": []}), "names no model (an empty list); add models.teacher"),
        (as_json(401, {"error": {"message": "no such key sk-secret"}}), "names no model (status 401); add"),
    ],
)
def test_a_server_that_names_no_model_is_told_and_no_secret(tiny_model_dir, monkeypatch, reply, told):
    monkeypatch.setattr(ProxyHandler, "do_GET", lambda self: self.answer(*reply), raising=False)
    proxy = Proxy(script=lambda body, number: completion())
    config = example("kd_black_box_api", str(tiny_model_dir), proxy.url)
    config["inference"]["api_key"] = "sk-secret"
    with pytest.raises(EngineGone) as caught:
        label_job(write(config), "out.json")
    assert told in str(caught.value) and "sk-secret" not in str(caught.value)
    proxy.shutdown()
    proxy.server_close()


def test_kd_black_box_train_only_trains(tiny_model_dir):
    Path("labeled.json").write_text(json.dumps(RECORDS))
    assert run_easy_distill(write(example("kd_black_box_train_only", str(tiny_model_dir))), "builtin") == 0
    check_trained()


@pytest.mark.slow
def test_kd_white_box_scores_what_is_labelled_and_trains_on_words_and_probabilities(tiny_model_dir):
    Path("labeled.json").write_text(json.dumps(RECORDS))
    os.remove("asked.json")
    assert run_easy_distill(write(example("kd_white_box", str(tiny_model_dir))), "builtin") == 0
    check_trained()
    found = json.loads(Path(OUT, "provenance.json").read_text())["probabilities"]
    assert (found["top"], found["kd_ratio"], found["distillation_type"]) == (10, 0.1, "forward_kld")


def test_kd_white_box_without_probabilities_does_not_train_on_words_alone(tiny_model_dir):
    Path("labeled.json").write_text(json.dumps(RECORDS))
    config = example("kd_white_box", str(tiny_model_dir))
    del config["dataset"]["logits_path"]
    with pytest.raises(ValueError, match=r"job\.json: dataset\.logits_path: missing.*label first"):
        train_student(write(config))
    assert not Path(OUT).exists()


def test_kd_white_box_train_only_trains_on_the_probabilities_that_are_there(tiny_model_dir, tiny):
    import numpy as np

    records = [{"input": "", **record} for record in RECORDS]
    Path("labeled.json").write_text(json.dumps(records))

    def uniform(row, example):
        return np.full((len(response_of(example)), len(tiny[1])), -np.log(len(tiny[1])))

    write_teacher("logits.json", tiny[1], records, uniform)
    config = example("kd_white_box_train_only", str(tiny_model_dir))
    assert run_easy_distill(write(config), "builtin") == 0
    check_trained()
    assert json.loads(Path(OUT, "provenance.json").read_text())["probabilities"]["kd_ratio"] == 0.1


def test_its_template_asks_as_it_trains(tiny_model_dir):
    """The prompt in training is the one that is asked with, token for token; then the answer and its end."""
    _, tokenizer = load_student(str(tiny_model_dir))
    template = read_template("template.jinja")
    asked = template.compiled.render(
        message={"role": "user", "content": "Name number 3."}, add_generation_prompt=True, add_output=False
    )
    trained = template.compiled.render(
        message={"content": "Name number 3.", "output": "It is 3."},
        add_generation_prompt=False,
        add_output=True,
    )
    assert asked == ASKED and not trained.startswith(asked)
    (example,) = build_examples([{"input": "", **RECORDS[3]}], tokenizer, template).train
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(response_of(example)) == "It is 3.</s>"


def test_the_job_is_one_model_for_all_who_read_it(tiny_model_dir):
    for job_type in JOBS:
        job = read_job(write(example(job_type, str(tiny_model_dir))))
        assert type(job) is JOBS[job_type] and job.training == TRAINING

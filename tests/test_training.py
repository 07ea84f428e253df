import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_app import load_student, run_easy_distill, write_system1_config, write_system2_config
from distill_app.core.prompts import chat_template, format_prompt
from distill_app.training.config import read_job, sft_arguments
from distill_app.training.examples import NO_LOSS, Template, build_examples, read_template

RECORDS = [
    {"instruction": f"Name number {n}.", "input": "" if n % 2 else "quick", "output": f"It is {n}."}
    for n in range(12)
]
OURS = Template(chat_template("system1"), chat_template("system1"))


@pytest.fixture
def project(tmp_path, tiny_model_dir, monkeypatch):
    """A folder with labelled data and a System 1 config for the tiny student."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/labeled.json").write_text(json.dumps(RECORDS))
    write_config(tiny_model_dir)
    return tmp_path


def write_config(student, **training):
    options = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "gradient_accumulation_steps": 1,
        **training,
    }
    return write_system1_config(
        config_path="configs/s1.json",
        student_model=str(student),
        labeled_path="data/labeled.json",
        out_dir="models/s1",
        num_epochs=2,
        training=options,
        backend="builtin",
    )


def test_loss_is_on_the_response_and_eos_alone(tiny):
    tokenizer = tiny[1]
    record = RECORDS[0]
    (example,), left_out = build_examples([record], tokenizer, OURS, None)
    learned = [t for t in example["labels"] if t != NO_LOSS]
    assert tokenizer.decode(learned) == " It is 0.</s>"
    assert left_out == 0


def test_a_changed_prompt_leaves_the_labels_as_they_are(tiny):
    changed = {**RECORDS[0], "instruction": "Tell number 0."}
    (one, two), _ = build_examples([RECORDS[0], changed], tiny[1], OURS, None)
    assert one["input_ids"] != two["input_ids"]
    assert [t for t in one["labels"] if t != NO_LOSS] == [t for t in two["labels"] if t != NO_LOSS]


def test_a_student_is_trained_on_exactly_the_text_it_is_asked_with(tiny):
    tokenizer = tiny[1]
    for mode in ("system1", "system2"):
        template = Template(chat_template(mode), None)
        (example,), _ = build_examples([RECORDS[0]], tokenizer, template, None)
        asked = tokenizer(format_prompt("Name number 0.", "quick", mode), add_special_tokens=False)
        head = [
            t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label == NO_LOSS
        ]
        assert head == asked["input_ids"]


def test_eos_is_learned_where_it_is_also_the_pad_token(tiny_copy):
    _, tokenizer = load_student(str(tiny_copy))
    tokenizer.pad_token = tokenizer.eos_token
    (example,), _ = build_examples(RECORDS[:1], tokenizer, OURS, None)
    assert example["labels"][-1] == tokenizer.eos_token_id


def test_an_example_over_the_limit_is_left_out_whole_and_counted(tiny):
    long = {**RECORDS[0], "output": "word " * 300}
    examples, left_out = build_examples([long, RECORDS[1]], tiny[1], OURS, 100)
    assert (len(examples), left_out) == (1, 1)


def test_a_template_whose_answer_changes_the_prompt_is_refused():
    template = Template("{{ message.output }}{{ message.content }}", None)
    with pytest.raises(ValueError, match="does not begin with the prompt"):
        template.render(RECORDS[1])


def test_training_writes_a_checkpoint_that_learned_and_tells_its_origin(project, tiny_model_dir):
    assert run_easy_distill("configs/s1.json") == 0
    model, tokenizer = load_student("models/s1")
    assert tokenizer.chat_template == chat_template("system1")
    loss = [float(x.split(",")[1]) for x in Path("models/s1/loss.csv").read_text().split()[1:]]
    assert len(loss) == 6 and loss[-1] < loss[0]
    origin = json.loads(Path("models/s1/provenance.json").read_text())
    assert origin["student"]["model"] == str(tiny_model_dir)
    assert origin["examples"] == {"examples": 12, "too_long": 0}
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not list(Path("models").glob(".*"))


def test_two_trainings_give_the_same_bytes(project, tiny_model_dir):
    files = {}
    for run in ("a", "b"):
        assert run_easy_distill("configs/s1.json") == 0
        files[run] = {p.name: p.read_bytes() for p in Path("models/s1").iterdir()}
    assert files["a"] == files["b"]


def test_another_seed_gives_other_weights(project, tiny_model_dir):
    weights = []
    for seed in (1, 2):
        config = json.loads(Path("configs/s1.json").read_text())
        config["dataset"]["seed"] = seed
        Path("configs/s1.json").write_text(json.dumps(config))
        assert run_easy_distill("configs/s1.json") == 0
        weights.append(Path("models/s1/model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_fewer_steps_than_logging_steps_still_give_a_loss(project, tiny_model_dir):
    write_config(tiny_model_dir, logging_steps=100)
    assert run_easy_distill("configs/s1.json") == 0
    assert len(Path("models/s1/loss.csv").read_text().split()) >= 2


def test_gradient_accumulation_weighs_tokens_not_batches(tiny_model_dir, tmp_path):
    """One batch of four against four of one, with answers of very different length, in float32."""
    from distill_app.core.models import load_trainable
    from distill_app.training.train import _silence

    records = [{**RECORDS[0], "output": "It is. " * n} for n in (1, 2, 8, 20)]
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        path = write_config_for_accumulation(tmp_path, tiny_model_dir, batch, steps)
        model, tokenizer = load_trainable(str(tiny_model_dir))
        examples, _ = build_examples(records, tokenizer, OURS, None)
        trainer = make_trainer(path, model, tokenizer, examples)
        _silence(trainer)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


def make_trainer(config_path, model, tokenizer, examples):
    from datasets import Dataset

    from distill_app.training.trainer import ResponseTrainer

    return ResponseTrainer(
        model=model,
        args=sft_arguments(read_job(config_path), str(config_path.parent / "scratch")),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(examples),
    )


def write_config_for_accumulation(folder, student, batch, steps):
    training = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "bf16": False,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "warmup_ratio": 0.0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
    }
    return Path(
        write_system1_config(
            str(folder / "c.json"),
            student_model=str(student),
            labeled_path="x.json",
            out_dir="y",
            training=training,
        )
    )


def test_our_loss_equals_a_plain_float64_reference(tiny_model_dir, tmp_path):
    from distill_app.core.models import load_trainable

    path = write_config_for_accumulation(tmp_path, tiny_model_dir, 2, 1)
    model, tokenizer = load_trainable(str(tiny_model_dir))
    examples, _ = build_examples(RECORDS[:2], tokenizer, OURS, None)
    trainer = make_trainer(path, model, tokenizer, examples)
    batch = trainer.data_collator(examples)
    count = sum(label != NO_LOSS for e in examples for label in e["labels"])
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    total = 0.0
    for e in examples:
        logits = model(torch.tensor([e["input_ids"]])).logits[0].double().log_softmax(-1)
        for place, label in enumerate(e["labels"]):
            if label != NO_LOSS:
                total -= logits[place - 1, label].item()
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"training": {"output_dir": "o", "learning_rat": 1}},
            r"training\.learning_rat: unknown to SFTConfig; did you mean learning_rate\?",
        ),
        ({"job_type": "kd_rainbow"}, "job_type: found 'kd_rainbow', expected one of"),
        ({"models": {}}, r"models\.student: missing"),
    ],
)
def test_a_config_that_cannot_be_run_names_the_key(project, change, message):
    path = Path("configs/s1.json")
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        sft_arguments(read_job(path), "scratch")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda: Path("data/labeled.json").write_text("[{]"), "data/labeled.json: line 1"),
        (lambda: Path("configs/s1.jinja").unlink(), "configs/s1.jinja: no such file"),
        (lambda: write_config("models/none"), "models/none: no such model folder"),
        (lambda: write_config("x", max_length=8), "over 8 tokens; raise training.max_length"),
    ],
)
def test_a_failed_training_says_why_in_one_line_and_leaves_nothing(
    project, tiny_model_dir, break_it, message, capfd
):
    Path("models").mkdir()
    break_it()
    path = Path("configs/s1.json")
    path.write_text(path.read_text().replace('"x"', json.dumps(str(tiny_model_dir))))
    assert run_easy_distill("configs/s1.json") == 1
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err
    assert list(Path("models").iterdir()) == []


def test_configs_hold_what_the_contract_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = json.loads(Path(write_system1_config()).read_text())
    two = json.loads(Path(write_system2_config()).read_text())
    assert one["job_type"] == "kd_black_box_local"
    assert one["dataset"]["instruction_path"] == "data/train_instructions.json"
    assert one["models"] == {
        "teacher": "Qwen/Qwen2.5-7B-Instruct",
        "student": "Qwen/Qwen2.5-0.5B-Instruct",
    }
    assert one["training"]["output_dir"] == "./distilled-qwen2.5-0.5b"
    assert two["job_type"] == "kd_black_box_train_only"
    assert two["dataset"]["labeled_path"] == "data/omnithought_cot.json"
    assert read_template(two["dataset"]["template"]).chat_template == chat_template("system2")
    assert "teacher" not in two["models"] and "backend" not in two
    given = json.loads(Path(write_system2_config("c.json", template_path="/a/b.jinja")).read_text())
    assert given["dataset"]["template"] == "/a/b.jinja"


def test_the_trainer_is_a_command_of_its_own():
    run = subprocess.run(
        [sys.executable, "-m", "distill_app.training", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "EasyDistill 1.0 JSON config" in run.stdout

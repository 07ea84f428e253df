"""On-policy distillation: what is minimised, whose prompt the teacher reads, what a killed run ends with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DistillationConfig
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from distill_app.core.models import load_tokenizer, save_checkpoint
from distill_app.core.prompts import format_prompt, teacher_prompt
from distill_app.evaluation.students import student_folder
from distill_app.refining.params import RefineParams
from distill_app.refining.prompts import bare_first_tokens, build_prompts
from distill_app.refining.refine import BETA, TeacherSource, refine_student
from distill_app.refining.teacher import fit_head, require_shared_tokenizer
from distill_app.refining.trainer import OnPolicyTrainer

RECORDS = [{"instruction": f"Name number {n}.", "input": "", "output": f"It is {n}."} for n in range(6)]
PARAMS = RefineParams(
    steps=4,
    batch_size=3,
    on_policy=0.5,
    divergence="reverse_kld",
    temperature=1.0,
    max_new_tokens=8,
    learning_rate=1e-3,
    gradient_checkpointing=False,
    save_steps=1,
    seed=7,
)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.json").write_text(json.dumps(RECORDS))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The tiny model's shape and tokenizer with other weights, and with a wider hidden layer."""
    return make_tiny_model(tmp_path_factory.mktemp("other") / "teacher", seed=1, size=48)


def refine(student, teacher, out="refined/s1", **changed):
    params = PARAMS.model_copy(update=changed)
    teacher, metrics = TeacherSource(str(teacher)), f"metrics/{out.replace('/', '_')}.json"
    return refine_student(params, teacher, str(student), "data.json", out, "system1", metrics)


def weights(folder):
    return Path(folder, "model.safetensors").read_bytes()


def make_trainer(student_dir, teacher_dir, divergence, temperature=1.0):
    tokenizer = load_tokenizer(str(student_dir))
    prompts = build_prompts(RECORDS, tokenizer, tokenizer, "system1", None, 256)
    arguments = DistillationConfig(
        output_dir="work/t",
        max_steps=1,
        per_device_train_batch_size=2,
        beta=BETA[divergence],
        temperature=temperature,
        max_completion_length=8,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(p, dtype="float32") for p in (student_dir, teacher_dir)
    )
    return OnPolicyTrainer(
        student,
        teacher,
        arguments,
        Dataset.from_dict({"prompt": [0, 1]}),
        prompts=prompts,
        on_policy=0.0,
        processing_class=tokenizer,
    )


def reference(trainer, divergence, temperature):
    """Return the mean divergence of the first two records' answers and its gradient, in float64, row by row."""
    student = AutoModelForCausalLM.from_pretrained(trainer.student_dir).double()
    teacher = AutoModelForCausalLM.from_pretrained(trainer.teacher_dir).double()
    total, tokens = 0, 0
    for prompt in trainer._prompts[:2]:
        first = trainer._bare.get(prompt.answer[0], prompt.answer[0])
        asked = torch.tensor([prompt.student + prompt.answer])
        theirs = torch.tensor([prompt.teacher + [first] + prompt.answer[1:]])
        places = slice(-len(prompt.answer), -1)  # of states that predict all but the first token
        log_q = (student(asked).logits[0, places] / temperature).log_softmax(-1)
        log_p = (teacher(theirs).logits[0, places] / temperature).log_softmax(-1).detach()
        if divergence == "jsd":
            log_m = (0.5 * log_q.exp() + 0.5 * log_p.exp()).log()
            found = 0.5 * (log_p.exp() * (log_p - log_m)) + 0.5 * (log_q.exp() * (log_q - log_m))
        else:
            of, to = (log_p, log_q) if divergence == "forward_kld" else (log_q, log_p)
            found = of.exp() * (of - to)
        total, tokens = total + found.sum(), tokens + len(prompt.answer) - 1
    (total / tokens).backward()
    return (total / tokens).item(), student


@pytest.mark.parametrize("divergence", list(BETA))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_are_those_of_a_plain_reference_in_float64(
    tiny_model_dir, other_model, divergence, temperature
):
    trainer = make_trainer(tiny_model_dir, other_model, divergence, temperature)
    trainer.student_dir, trainer.teacher_dir = tiny_model_dir, other_model
    expected, plain = reference(trainer, divergence, temperature)
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": 0}, {"prompt": 1}])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", list(BETA))
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_copy, divergence):
    tokenizer = load_tokenizer(str(tiny_copy))
    tokenizer.chat_template = None  # so that both are asked in the same words
    tokenizer.save_pretrained(tiny_copy)
    (tiny_copy / "chat_template.jinja").unlink(missing_ok=True)
    trainer = make_trainer(tiny_copy, tiny_copy, divergence)
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": 0}, {"prompt": 1}])
    assert (inputs["tool_mask"] * inputs["completion_mask"]).tolist() == inputs["completion_mask"].tolist()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert max(float(p.grad.abs().max()) for p in trainer.model.parameters()) < 1e-4


def test_the_teacher_reads_its_own_format_and_an_answer_without_the_blank(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    bare = bare_first_tokens(tokenizer, len(tokenizer))
    assert {tokenizer.decode([a]).lstrip() == tokenizer.decode([b]) for a, b in bare.items()} == {True}
    trainer = make_trainer(tiny_model_dir, tiny_model_dir, "reverse_kld")
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": 0}, {"prompt": 1}])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    asked, there = trainer._as_asked(ids, mask, inputs["completion_ids"].shape[1])
    texts = [tokenizer.decode(row[keep.bool()]) for row, keep in zip(asked, there, strict=True)]
    expected = [teacher_prompt(tokenizer, f"Name number {n}.", "", "system1") for n in (0, 1)]
    assert [any(text.startswith(prompt) for prompt in expected) for text in texts] == [True, True]
    assert all(format_prompt(f"Name number {n}.") not in text for n in (0, 1) for text in texts)
    assert inputs["tool_mask"][:, 0].tolist() == [0, 0]


def test_a_refined_student_is_a_checkpoint_with_its_records(tiny_model_dir, other_model, capsys):
    metrics = refine(tiny_model_dir, other_model)
    assert weights("refined/s1") != weights(tiny_model_dir)
    lines = Path("refined/s1/refinement.csv").read_text().splitlines()
    assert lines[0] == "step,on_policy,divergence,entropy,tokens,cut" and len(lines) == 5
    assert {line.split(",")[1] for line in lines[1:]} == {"0.0", "1.0"}
    assert metrics["steps"] == 4 and metrics["divergence"] > 0 and 0 <= metrics["cut"] <= 1
    assert metrics == json.loads(Path("refined/s1/metrics.json").read_text())
    assert metrics == json.loads(Path("metrics/refined_s1.json").read_text())
    origin = json.loads(Path("refined/s1/provenance.json").read_text())
    assert origin["job_type"] == "on_policy" and origin["training"]["divergence"] == "reverse_kld"
    assert "on_policy" in Path("refined/s1/README.md").read_text()
    assert not list(Path("work/training/refined-s1").glob("*/checkpoint-*"))
    assert "refining: 6 prompts" in capsys.readouterr().err


def test_on_policy_steps_teach_the_student_what_the_teacher_would_say(tiny_model_dir, other_model):
    metrics = refine(tiny_model_dir, other_model, steps=30, batch_size=6, on_policy=1.0, learning_rate=1e-2)
    assert metrics["divergence"] < 0.7 * metrics["divergence_before"]


def test_a_killed_refinement_ends_with_the_same_bytes(tiny_model_dir, other_model, monkeypatch):
    refine(tiny_model_dir, other_model, out="whole/s1", steps=6)

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    made = OnPolicyTrainer.__init__

    def breaking(self, *args, **options):
        made(self, *args, **options)
        self.add_callback(Killed())

    with monkeypatch.context() as patched:
        patched.setattr(OnPolicyTrainer, "__init__", breaking)
        with pytest.raises(KeyboardInterrupt):
            refine(tiny_model_dir, other_model, out="killed/s1", steps=6)
    assert not Path("killed/s1").exists() and list(Path("work/training/killed-s1").glob("*/checkpoint-3"))
    torch.manual_seed(99)
    refine(tiny_model_dir, other_model, out="killed/s1", steps=6)
    assert weights("killed/s1") == weights("whole/s1")
    assert Path("killed/s1/refinement.csv").read_text() == Path("whole/s1/refinement.csv").read_text()


def test_switched_off_it_opens_no_model():
    assert refine("no/such/student", "no/such/teacher", out="models/refined/system1", steps=0) == {"steps": 0}
    assert [path.name for path in Path("models/refined/system1").iterdir()] == ["off.json"]
    assert student_folder("models", "system1") == Path("models/system1")
    table = Path("metrics/models_refined_system1.csv").read_text()
    assert table == "step,on_policy,divergence,entropy,tokens,cut\n"


@pytest.mark.parametrize("rows", [390, 400, 410])
def test_output_layers_of_other_sizes_are_fitted(tiny_model_dir, rows):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    before = teacher(ids).logits
    fit_head(teacher, rows, 2, 2)
    after = teacher(ids).logits
    shared = min(rows, before.shape[-1])
    assert after.shape[-1] == rows == teacher.config.vocab_size
    torch.testing.assert_close(after[..., :shared], before[..., :shared])
    assert after.softmax(-1)[..., shared:].sum() == 0


def test_the_teachers_end_of_sequence_falls_on_the_students(tiny_model_dir):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    before = teacher(ids).logits
    fit_head(teacher, before.shape[-1], 2, 9)
    after = teacher(ids).logits
    torch.testing.assert_close(after[..., 9], before[..., 2])
    torch.testing.assert_close(after[..., 2], before[..., 9])
    torch.testing.assert_close(after[..., 10:], before[..., 10:])


def test_a_padded_teacher_refines_a_student(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    model.resize_token_embeddings(416)
    save_checkpoint(model, load_tokenizer(str(tiny_model_dir)), tmp_path / "padded")
    assert refine(tiny_model_dir, tmp_path / "padded", steps=2)["steps"] == 2


def test_another_tokenizer_is_refused_in_words(tiny_model_dir, tiny_copy):
    words = json.loads((tiny_copy / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, two = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tiny_copy / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="its tokenizer is not that of its teacher"):
        require_shared_tokenizer(
            "t", load_tokenizer(str(tiny_copy)), "s", load_tokenizer(str(tiny_model_dir))
        )


def test_records_that_do_not_fit_are_counted(tiny_copy, other_model, capsys):
    config = json.loads((tiny_copy / "config.json").read_text())
    config["max_position_embeddings"] = 60
    (tiny_copy / "config.json").write_text(json.dumps(config))
    long = {"instruction": "Name number " * 30, "input": "", "output": "It is."}
    Path("data.json").write_text(json.dumps([*RECORDS, long]))
    refine(tiny_copy, other_model, steps=1)
    assert "refining: 6 prompts; 1 too long, left out" in capsys.readouterr().err
    Path("data.json").write_text(json.dumps([long]))
    shutil.rmtree("refined")
    with pytest.raises(ValueError, match="nothing to refine with: none of 1 records fits 60 tokens"):
        refine(tiny_copy, other_model, steps=1)


# A toy in float64: words A, B, end, of which each text has two; a state is the word before (or none)
START, AFTER_A, AFTER_B = range(3)
TEACHER = torch.tensor([[0.998, 0.001, 0.001], [0.01, 0.01, 0.98], [0.01, 0.01, 0.98]], dtype=torch.float64)
STUDENT = torch.tensor([[0.6, 0.399, 0.001], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]], dtype=torch.float64)
TEACHERS_TEXTS = [[START, AFTER_A]] * 10
# It begins with B where its teacher does not
STUDENTS_TEXTS = [[START, AFTER_A]] * 6 + [[START, AFTER_B]] * 4


def errors_after(texts, divergence):
    """Return how far a table of a student's logits is from its teacher's in each state, KL in nats.

    It is trained by the trainer's own loss on the states of the texts. Its first word cannot be taught: that
    stands for a student too small to tell when to begin as its teacher does.
    """
    logits = STUDENT.log().requires_grad_()
    states = torch.eye(3, dtype=torch.float64)[torch.tensor(texts)]
    for _ in range(1000):
        loss, *_ = _chunked_divergence_loss(
            states, states, logits.T, TEACHER.log().T, torch.ones(len(texts), 2), BETA[divergence]
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2 * gradient * torch.tensor([[0.0], [1.0], [1.0]])).detach().requires_grad_()
    return (TEACHER * (TEACHER.log() - logits.log_softmax(-1))).sum(-1).detach()


def test_fixed_texts_leave_the_error_where_the_teacher_never_goes():
    known = float((TEACHER[AFTER_B] * (TEACHER[AFTER_B] / STUDENT[AFTER_B]).log()).sum())
    errors = errors_after(TEACHERS_TEXTS, "forward_kld")
    assert errors[AFTER_A] < 1e-3
    assert errors[AFTER_B] == pytest.approx(known, rel=1e-9) and known > 2.8


@pytest.mark.parametrize("divergence", list(BETA))
def test_the_students_own_texts_remove_that_error(divergence):
    assert max(errors_after(STUDENTS_TEXTS, divergence)[[AFTER_A, AFTER_B]]) < 1e-3


@pytest.mark.parametrize("stage", ["refine_s1", "refine_s2"])
def test_a_stage_that_is_off_loads_no_torch(stage: str) -> None:
    """It is part of every run, and torch takes seconds."""
    check = f"import sys, stages.{stage}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", check], cwd=root, check=False).returncode == 0

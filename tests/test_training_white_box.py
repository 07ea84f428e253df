"""Learning from a teacher's probabilities: the right row, the right place, the right words."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import (
    OURS,
    OUT,
    RECORDS,
    curve,
    dies_at,
    exit_code,
    files_of,
    in_fork,
    response_of,
    train,
    write_job,
    write_teacher,
)

from distill_app.core.logits import About, TopLogits, TopRow, new_top_logits, tokenizer_digest
from distill_app.core.models import load_tokenizer, load_trainable, save_checkpoint
from distill_app.training.batches import Collator
from distill_app.training.examples import build_examples, with_teacher
from distill_app.training.trainer import DistillationTrainer

LOGITS = "data/logits.arrow"
TOP = 8


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to train in."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()


def write_white_box(student, records=RECORDS, distillation=None, sections=None, **training):
    return write_job(
        student,
        records,
        sections={
            "job_type": "kd_white_box_train_only",
            "dataset": {"logits_path": LOGITS},
            "distillation": {"kd_ratio": 1.0, **(distillation or {})},
            **(sections or {}),
        },
        **training,
    )


def of_model(model, vocab_size, rolled=0):
    """Return the distribution function of a model, its rows rolled by some places."""

    def distribution(row, example):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([example.input_ids])).logits[0, :, :vocab_size].double()
        start = len(example.labels) - len(response_of(example))
        logs = scores.log_softmax(-1)[start - 1 : -1].numpy()
        return np.roll(logs, rolled, 0)

    return distribution


def marked(row, example):
    """Give record and place away by the likeliest token."""
    logs = np.full((len(response_of(example)), 388), np.log(1e-6))
    logs[np.arange(len(logs)), mark(row, np.arange(len(logs)))] = 0.0
    return logs - np.log(np.exp(logs).sum(1, keepdims=True))


def mark(row, place):
    return 3 + (row * 23 + place) % 380


def first_loss(student, **options):
    train(write_white_box(student, **{"learning_rate": 1e-9, "per_device_train_batch_size": 4, **options}))
    return curve(OUT)[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kld", "reverse_kld"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tiny_model_dir, divergence):
    model, tokenizer = load_trainable(str(tiny_model_dir))
    how = {"distillation_type": divergence, "temperature": 1.5}
    write_teacher(LOGITS, tokenizer, RECORDS, of_model(model, len(tokenizer)), TOP)
    assert first_loss(tiny_model_dir, distillation=how) == pytest.approx(0, abs=6e-4)
    for rolled in (1, -1):
        write_teacher(LOGITS, tokenizer, RECORDS, of_model(model, len(tokenizer), rolled), TOP)
        assert first_loss(tiny_model_dir, distillation=how) > 0.5


@pytest.mark.slow
def test_padding_of_the_output_layer_is_no_part_of_the_vocabulary(tiny_copy):
    """The student's layer has rows that the teacher's has not, and they would take most of the mass."""
    model, tokenizer = load_trainable(str(tiny_copy))
    size = len(tokenizer)
    model.resize_token_embeddings(size + 12)
    with torch.no_grad():
        model.lm_head.weight[size:] = 3 * model.lm_head.weight[:12]
    save_checkpoint(model, tokenizer, tiny_copy)
    model, _ = load_trainable(str(tiny_copy))
    assert len(model.lm_head.weight) == size + 12
    write_teacher(LOGITS, tokenizer, RECORDS, of_model(model, size), TOP)
    assert first_loss(tiny_copy) == pytest.approx(0, abs=6e-4)
    write_teacher(LOGITS, tokenizer, RECORDS, of_model(model, size), TOP, vocab_size=size + 12)
    assert first_loss(tiny_copy) > 0.1


def watch_rows(monkeypatch, tokenizer, seen):
    """Have each part of each step checked for the marks of its own records at their own places."""
    rows = {tuple(response_of(e)): e.row for e in build_examples(RECORDS, tokenizer, OURS).train}
    real = DistillationTrainer.compute_loss

    def checked(self, model, inputs, **options):
        spans = [values[0].split(inputs["lengths"].tolist()) for values in (inputs["labels"],)][0]
        ids = inputs["teacher_ids"][0].split(inputs["lengths"].tolist())
        known = inputs["teacher_known"][0].split(inputs["lengths"].tolist())
        for labels, likeliest, has in zip(spans, ids, known, strict=True):
            learned = labels != -100
            assert torch.equal(learned, has)
            if not learned.any():
                continue  # what rounds a row up
            row = rows[tuple(labels[learned].tolist())]
            expected = mark(row, np.arange(int(learned.sum()))).tolist()
            assert likeliest[learned][:, 0].tolist() == expected
            seen.append(row)
        return real(self, model, inputs, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", checked)


def test_each_answers_tokens_get_their_own_distributions_however_it_is_shuffled(tiny_model_dir, monkeypatch):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    write_teacher(LOGITS, tokenizer, RECORDS, marked, TOP)
    seen = []
    watch_rows(monkeypatch, tokenizer, seen)
    train(write_white_box(tiny_model_dir, gradient_accumulation_steps=2, max_length=60, bf16=True))
    epochs = seen[:12], seen[12:]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(12))


def test_distributions_stay_with_their_answers_where_some_are_held_out_and_some_dropped(
    tiny_model_dir, monkeypatch
):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    write_teacher(LOGITS, tokenizer, RECORDS, marked, TOP)
    sizes = [len(e.input_ids) for e in build_examples(RECORDS, tokenizer, OURS).train]
    seen = []
    watch_rows(monkeypatch, tokenizer, seen)
    sections = {"validation": {"fraction": 0.3}}
    train(write_white_box(tiny_model_dir, sections=sections, max_length=max(sizes) - 1, num_train_epochs=1))
    counts = json.loads(Path(OUT, "provenance.json").read_text())["examples"]
    assert counts["too_long_dropped"] and counts["validation"] and counts["train"] == len(seen)
    assert curve(OUT, "validation")[0][1] > 1  # of the words: the teacher says nothing about these


@pytest.mark.slow
def test_a_killed_white_box_training_goes_on_to_the_same_bytes(tiny_model_dir, monkeypatch):
    model, tokenizer = load_trainable(str(tiny_model_dir))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    write_teacher(LOGITS, tokenizer, RECORDS, of_model(model, len(tokenizer)), TOP)
    path = write_white_box(tiny_model_dir, distillation={"kd_ratio": 0.6}, save_steps=2)
    unbroken = files_of(train(path))
    shutil.rmtree("models")
    with monkeypatch.context() as patch:
        dies_at(patch, DistillationTrainer, "training_step", 4, after=False)
        assert exit_code(in_fork(lambda: train(path))) == -9
    real, seen = DistillationTrainer.training_step, []
    patch = pytest.MonkeyPatch()
    patch.setattr(DistillationTrainer, "training_step", lambda *a, **k: seen.append(1) or real(*a, **k))
    train(path)
    patch.undo()
    assert len(seen) == 4
    assert files_of(OUT) == unbroken


def test_the_student_comes_near_the_teacher(tiny_model_dir):
    model, tokenizer = load_trainable(str(tiny_model_dir))
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.add_(0.3 * torch.randn_like(model.lm_head.weight))
    write_teacher(LOGITS, tokenizer, RECORDS, of_model(model, len(tokenizer)), TOP)
    train(write_white_box(tiny_model_dir, num_train_epochs=6, learning_rate=5e-3))
    points = curve(OUT)
    assert points[-1][1] < points[0][1] / 3
    origin = json.loads(Path(OUT, "provenance.json").read_text())["probabilities"]
    assert (origin["path"], origin["top"], origin["kd_ratio"], origin["teacher"]) == (
        LOGITS,
        TOP,
        1.0,
        "tiny",
    )


def test_a_ratio_of_nothing_learns_from_the_words_alone(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    write_teacher(LOGITS, tokenizer, RECORDS, marked, TOP)
    train(write_white_box(tiny_model_dir, distillation={"kd_ratio": 0.0}))
    taught = files_of(OUT)["model.safetensors"]
    train(write_job(tiny_model_dir))
    assert files_of(OUT)["model.safetensors"] == taught


def test_other_answers_distributions_are_refused_with_the_records_number(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    others = [*RECORDS[:7], {**RECORDS[7], "output": "No."}, *RECORDS[8:]]
    write_teacher(LOGITS, tokenizer, others, marked, TOP)
    message = r"logits\.arrow: record 7: found the teacher's distributions of another answer, 'No\.', expected 'It is 7"
    with pytest.raises(ValueError, match=message):
        train(write_white_box(tiny_model_dir))


def test_rows_in_another_order_are_refused(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    write_teacher(LOGITS, tokenizer, RECORDS[::-1], marked, TOP)
    with pytest.raises(ValueError, match=r"record 0: found the teacher's distributions of another answer"):
        train(write_white_box(tiny_model_dir))


def test_another_number_of_rows_is_refused(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    write_teacher(LOGITS, tokenizer, RECORDS[:-1], marked, TOP)
    with pytest.raises(ValueError, match=r"distributions of 11 records, expected 12; run the"):
        train(write_white_box(tiny_model_dir))


def test_another_tokenizers_distributions_are_refused(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.add_tokens(["<other>"])
    write_teacher(LOGITS, tokenizer, RECORDS, marked, TOP)
    with pytest.raises(
        ValueError, match=r"the teacher tiny has another tokenizer than .*; take a student of the"
    ):
        train(write_white_box(tiny_model_dir))


def test_a_file_without_probabilities_is_refused(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    write_teacher(LOGITS, tokenizer, RECORDS, marked, top=0)
    with pytest.raises(
        ValueError, match=r"logits\.arrow: found no probabilities; set label\.top_logits .* above 0 and run"
    ):
        train(write_white_box(tiny_model_dir))


def test_a_missing_file_of_probabilities_is_named(tiny_model_dir):
    with pytest.raises(FileNotFoundError, match=r"logits\.arrow: no such file"):
        train(write_white_box(tiny_model_dir))


def aligned(tokenizer, record, answer, end=None, **options):
    """Return a record's example beside a teacher's that gave the same answer in tokens of its own.

    The teacher ends a sequence with the token `end`, or with the student's.
    """
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    tokens = np.array([*ids, tokenizer.eos_token_id if end is None else end], np.int32)
    with new_top_logits(LOGITS, About(1, len(tokenizer), tokenizer_digest(tokenizer), "tiny")) as add:
        add(TopRow(tokens, tokens[:, None], np.zeros((len(tokens), 1)), np.zeros(len(tokens))))
    examples = build_examples([record], tokenizer, OURS, **options).train
    (example,) = with_teacher(examples, TopLogits(LOGITS), tokenizer, 1)
    return example, tokens.tolist()


@pytest.mark.parametrize(
    "answer", ["Strawberries, cherries and 7.", "it is so. It is.", "\u00e9t\u00e9 comes"]
)
def test_where_the_first_word_is_cut_otherwise_the_rest_finds_its_place(tiny, answer):
    """The student's answer stands after a blank, the teacher's at the start of its turn."""
    record = {"instruction": "Name it.", "input": "", "output": answer}
    example, theirs = aligned(tiny[1], record, answer)
    ours = response_of(example)
    assert ours != theirs and 0 < example.known < len(ours)
    end = example.offset + example.known
    assert ours[-example.known :] == theirs[example.offset : end] and end == len(theirs)
    assert ours[-example.known - 1] != theirs[example.offset - 1]  # no token more could have been taken
    batch = Collator(TopLogits(LOGITS))([example, example])
    known = batch["teacher_known"][0]
    assert known.tolist() == 2 * ([False] * (len(example.labels) - example.known) + [True] * example.known)
    assert torch.equal(batch["teacher_ids"][0, known, 0], batch["labels"][0, known])


def test_an_answer_that_was_cut_finds_its_place(tiny):
    record = {"instruction": "Name it.", "input": "", "output": "Strawberries and cherries. " * 9}
    example, theirs = aligned(
        tiny[1], record, " " + record["output"].strip(), max_length=40, cut_too_long=True
    )
    ours = response_of(example)
    assert (example.known, example.offset) == (len(ours), 0)
    assert ours == theirs[: len(ours)] and len(ours) < len(theirs)


def test_an_answer_that_only_begins_as_the_teachers_is_refused(tiny):
    record = {"instruction": "Name it.", "input": "", "output": "It is 3."}
    with pytest.raises(ValueError, match="record 0: found the teacher's distributions of another answer"):
        aligned(tiny[1], record, " It is 3. And more.")


@pytest.mark.parametrize("output", ["It is 3.", "Strawberries, cherries and 7.", "Yes", "24"])
@pytest.mark.parametrize("answer", ["{}", " {}"])
def test_an_end_of_sequence_of_another_kind_is_one_unknown_token(tiny, output, answer):
    """A chat model teaches its base model: the same tokenizer, another token at the end."""
    record = {"instruction": "Name it.", "input": "", "output": output}
    tokenizer = tiny[1]
    end = tokenizer.convert_tokens_to_ids("<s>")
    example, theirs = aligned(tokenizer, record, answer.format(output), end)
    ours = response_of(example)
    assert (ours[-1], theirs[-1], example.unknown_end) == (tokenizer.eos_token_id, end, 1)
    same, _ = aligned(tokenizer, record, answer.format(output))
    assert (example.known, example.offset) == (same.known - 1, same.offset)
    batch = Collator(TopLogits(LOGITS))([example, example])
    known = batch["teacher_known"][0].split(len(example.labels))
    for one in known:
        assert int(one.sum()) == example.known and not one[-1]
    assert torch.equal(
        batch["teacher_ids"][0, batch["teacher_known"][0], 0],
        batch["labels"][0, batch["teacher_known"][0]],
    )


@pytest.mark.parametrize("said", ["It is 3. And more.", "It is", "It is 4."])
def test_another_answer_is_refused_whatever_ends_it(tiny, said):
    record = {"instruction": "Name it.", "input": "", "output": "It is 3."}
    for end in (None, tiny[1].convert_tokens_to_ids("<s>")):
        with pytest.raises(ValueError, match="found the teacher's distributions of another answer"):
            aligned(tiny[1], record, f" {said}", end)


def as_base_model(folder):
    """Give a checkpoint's tokenizer another end of sequence, padding and chat template, and a token more."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token, tokenizer.chat_template = "<s>", None
    tokenizer.add_special_tokens({"pad_token": "<|new padding|>"})
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_base_model_learns_from_the_chat_model_of_its_family(tiny_model_dir, tiny_copy):
    model, teachers = load_trainable(str(tiny_model_dir))
    write_teacher(LOGITS, teachers, RECORDS, of_model(model, len(teachers)), TOP)
    student = as_base_model(tiny_copy)
    assert student.eos_token_id != teachers.eos_token_id and len(student) == len(teachers) + 1
    # The weights are the teacher's own, so all that is left is the word that ends an answer
    known = sum(len(response_of(e)) for e in build_examples(RECORDS, student, OURS).train)
    expected = 0.0
    for example in build_examples(RECORDS, student, OURS).train:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        expected -= logits[-2, student.eos_token_id].item()
    assert first_loss(tiny_copy, per_device_train_batch_size=12) == pytest.approx(expected / known, abs=2e-3)


def test_a_tokenizer_of_as_many_other_tokens_is_refused(tiny_copy):
    tokenizer = load_tokenizer(str(tiny_copy))
    write_teacher(LOGITS, tokenizer, RECORDS, marked, TOP)
    path = tiny_copy / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["0"], words["1"] = words["1"], words["0"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the teacher tiny has another tokenizer than"):
        train(write_white_box(tiny_copy))

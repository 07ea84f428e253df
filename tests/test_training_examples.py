import random
from itertools import pairwise

import pytest
from trainings import OURS, RECORDS, response_of

from distill_app import load_student
from distill_app.core.prompts import chat_template, format_prompt
from distill_app.training.examples import NO_LOSS, Template, build_examples, read_template

LONG = {**RECORDS[0], "output": "word " * 300}


def test_loss_is_on_the_response_and_eos_alone(tiny):
    (example,) = build_examples(RECORDS[:1], tiny[1], OURS).train
    assert tiny[1].decode(response_of(example)) == " It is 0.</s>"
    start = len(example.labels) - len(response_of(example))
    assert example.labels[start:] == example.input_ids[start:]
    assert set(example.labels[:start]) == {NO_LOSS}


def test_a_changed_prompt_leaves_the_labels_as_they_are(tiny):
    changed = {**RECORDS[0], "instruction": "Tell number 0."}
    one, two = build_examples([RECORDS[0], changed], tiny[1], OURS).train
    assert one.input_ids != two.input_ids
    assert response_of(one) == response_of(two)


@pytest.mark.parametrize("mode", ["system1", "system2"])
def test_a_student_is_trained_on_exactly_the_text_it_is_asked_with(tiny, mode):
    template = Template(chat_template(mode), None)
    (example,) = build_examples(RECORDS[:1], tiny[1], template).train
    asked = tiny[1](format_prompt("Name number 0.", "quick", mode), add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(asked)] == asked
    assert example.labels[: len(asked)] == [NO_LOSS] * len(asked)
    assert len(response_of(example)) == len(example.labels) - len(asked)


def test_eos_is_learned_where_it_is_also_the_pad_token(tiny_copy):
    _, tokenizer = load_student(str(tiny_copy))
    tokenizer.pad_token = tokenizer.eos_token
    (example,) = build_examples(RECORDS[:1], tokenizer, OURS).train
    assert example.labels[-1] == example.input_ids[-1] == tokenizer.eos_token_id


def test_the_whole_text_is_learned_where_the_config_says_so_but_not_its_first_token(tiny):
    (example,) = build_examples(RECORDS[:1], tiny[1], OURS, response_only=False).train
    assert example.labels == [NO_LOSS, *example.input_ids[1:]]


def test_a_first_token_is_never_learned_from_the_example_before_it(tiny):
    """A template with an empty prompt has its response begin the example."""
    template = Template("{% if add_output %}{{ message.content }}{{ message.output }}{% endif %}", None)
    (example,) = build_examples(RECORDS[:1], tiny[1], template).train
    assert example.labels == [NO_LOSS, *example.input_ids[1:]]


def test_an_example_over_the_limit_is_dropped_whole_and_counted(tiny):
    found = build_examples([LONG, RECORDS[1]], tiny[1], OURS, 100)
    assert [example.row for example in found.train] == [1]
    assert found.counts() == {"train": 1, "validation": 0, "too_long_dropped": 1, "too_long_cut": 0}


def test_an_example_of_just_the_limit_stays_whole(tiny):
    (whole,) = build_examples([LONG], tiny[1], OURS).train
    size = len(whole.input_ids)
    assert build_examples([LONG], tiny[1], OURS, size).train == [whole]
    assert build_examples([LONG], tiny[1], OURS, size - 1).train == []


def test_an_example_over_the_limit_is_cut_and_does_not_learn_to_stop(tiny):
    (whole,) = build_examples([LONG], tiny[1], OURS).train
    found = build_examples([LONG, RECORDS[1]], tiny[1], OURS, 100, cut_too_long=True)
    assert found.train[0].input_ids == whole.input_ids[:100]
    assert found.train[0].labels == whole.labels[:100]
    assert tiny[1].eos_token_id not in found.train[0].labels
    assert (found.cut, found.dropped, len(found.train)) == (1, 0, 2)


def test_an_example_whose_prompt_fills_the_limit_is_dropped_even_where_others_are_cut(tiny):
    prompt = tiny[1](OURS.render(LONG)[0], add_special_tokens=False)["input_ids"]
    found = build_examples([LONG], tiny[1], OURS, len(prompt), cut_too_long=True)
    assert (found.cut, found.dropped, found.train) == (0, 1, [])
    (example,) = build_examples([LONG], tiny[1], OURS, len(prompt) + 1, cut_too_long=True).train
    assert len(response_of(example)) == 1


def test_a_template_whose_answer_changes_the_prompt_is_refused():
    with pytest.raises(ValueError, match="does not begin with the prompt"):
        Template("{{ message.output }}{{ message.content }}", None).render(RECORDS[1])


def test_a_template_that_is_no_jinja_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"dataset\.template: line 2: .*; fix the template"):
        Template("User:\n{% if %}", None).render(RECORDS[1])


def test_a_missing_template_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset\.template: .*none\.jinja: no such file"):
        read_template(str(tmp_path / "none.jinja"))


def test_only_a_template_that_servers_can_use_goes_into_the_checkpoint(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ message.content }}: {{ message.output }}")
    assert read_template(str(path)).chat_template is None
    path.write_text(chat_template("system2"))
    assert read_template(str(path)).chat_template == chat_template("system2")
    assert read_template(None) == OURS


def _held_out(records, tokenizer, fraction=0.3, seed=0):
    found = build_examples(records, tokenizer, OURS, validation_fraction=fraction, seed=seed)
    return {records[example.row]["instruction"] for example in found.validation}, found


def test_the_held_out_share_is_about_what_is_asked_for(tiny):
    records = [{"instruction": f"Say {n}.", "input": "", "output": "x"} for n in range(600)]
    _, found = _held_out(records, tiny[1], 0.2)
    assert 90 <= len(found.validation) <= 150  # 120 and three deviations
    assert len(found.train) + len(found.validation) == 600
    assert not _held_out(records, tiny[1], 0.0)[1].validation


def test_duplicates_of_a_question_fall_on_one_side(tiny):
    records = [
        {"instruction": text, "input": "", "output": output}
        for n in range(40)
        for text, output in ((f"Say number {n}.", "a"), (f"say  Number {n}. ", "b"))
    ]
    _, found = _held_out(records, tiny[1])
    held_out = {example.row for example in found.validation}
    assert 0 < len(held_out) < len(records)
    assert {row ^ 1 for row in held_out} == held_out


def test_spellings_of_a_question_that_the_held_out_split_takes_for_one_fall_on_one_side(tiny):
    """Punctuation, letters' forms and marks without width: `normalise` is the one judge of both splits."""
    records = [
        {"instruction": text, "input": "", "output": "a"}
        for n in range(40)
        for text in (f"Say: number {n}!", f"\uff33ay num\u200bber {n}")
    ]
    held_out = {example.row for example in _held_out(records, tiny[1])[1].validation}
    assert 0 < len(held_out) < len(records)
    assert {row ^ 1 for row in held_out} == held_out


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order(tiny):
    records = [{"instruction": f"Say {n}.", "input": "", "output": "x"} for n in range(60)]
    mixed = random.Random(0).sample(records, len(records))
    assert _held_out(records, tiny[1])[0] == _held_out(mixed, tiny[1])[0]
    assert _held_out(records, tiny[1])[0] != _held_out(records, tiny[1], seed=1)[0]


def test_examples_keep_the_order_and_the_number_of_their_records(tiny):
    _, found = _held_out(RECORDS, tiny[1])
    rows = [example.row for example in found.train]
    assert all(one < two for one, two in pairwise(rows))
    assert sorted(rows + [example.row for example in found.validation]) == list(range(len(RECORDS)))

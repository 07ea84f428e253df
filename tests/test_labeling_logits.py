import copy
import json
import shutil
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import ROOT, label_params

from distill_app.core.files import read_records
from distill_app.core.logits import TopLogits, TopRow, tokenizer_digest
from distill_app.core.models import load_student, load_trainable, save_checkpoint
from distill_app.labeling import logits
from distill_app.labeling.logits import check_top_logits, score_answers, write_top_logits

TOP = 5
RECORDS = [
    {"instruction": "Name three fruits", "input": "", "output": "Strawberries, cherries and raspberries."},
    {"instruction": "Add", "input": "4 * 6", "output": "24"},
    {"instruction": "Think step by step. " * 9, "input": "fox", "output": "jumps"},
    {"instruction": "Say", "input": "", "output": "The answer is 19. " * 12},
    {"instruction": "Say 5.", "input": "ü", "output": "漢字"},
    {"instruction": "Hello", "input": "", "output": "x"},
]


@pytest.fixture(scope="module")
def exact(tiny_model_dir):
    """The tiny model in float32, whose rounding float16 does not show."""
    model, tokenizer = load_trainable(str(tiny_model_dir))
    return model.eval(), tokenizer


def reference(model, tokenizer, record: dict[str, str]) -> tuple[list[int], np.ndarray]:
    """Return an answer's tokens and, for each, the log-probability of every token before it is seen.

    In float64, one token at a time, without padding, cache or batch.
    """
    content = f"{record['instruction'].strip()}\nInput: {record['input']}".removesuffix("\nInput: ")
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    seen = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [*tokenizer(record["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    double = copy.deepcopy(model).double()
    rows = []
    for token in tokens:
        with torch.no_grad():
            rows.append(double(torch.tensor([seen])).logits[0, -1, : len(tokenizer)].log_softmax(-1).numpy())
        seen = [*seen, token]
    return tokens, np.stack(rows)


def assert_close(found: TopRow, expected: TopRow) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found.tail, expected.tail, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("top", [1, TOP, 380])
def test_each_row_is_what_a_plain_loop_in_float64_finds(exact, top):
    for record, row in zip(RECORDS, score_answers(*exact, RECORDS, top), strict=True):
        tokens, every = reference(*exact, record)
        assert row.tokens.tolist() == tokens
        assert row.ids.shape == row.logprobs.shape == (len(tokens), top)
        order = np.argsort(-every, axis=1)
        np.testing.assert_allclose(
            row.logprobs, np.take_along_axis(every, order[:, :top], 1), rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(
            row.logprobs, np.take_along_axis(every, row.ids.astype(int), 1), rtol=1e-3, atol=1e-3
        )
        assert all(len(set(ids)) == top for ids in row.ids.tolist())
        rest = np.take_along_axis(every, order[:, top:], 1)
        np.testing.assert_allclose(row.tail, np.log(np.exp(rest).sum(1)), rtol=1e-3, atol=1e-3)


def test_bfloat16_weights_give_the_same_within_their_rounding(tiny, exact):
    for row, plain in zip(
        score_answers(*tiny, RECORDS, TOP), score_answers(*exact, RECORDS, TOP), strict=True
    ):
        assert np.abs(row.logprobs[:, 0] - plain.logprobs[:, 0]).mean() < 0.05


def test_what_is_kept_and_the_tail_add_up_to_one(tiny):
    for row in score_answers(*tiny, RECORDS, TOP):
        assert (np.diff(row.logprobs.astype(float), axis=1) <= 0).all()
        whole = np.exp(row.logprobs.astype(float)).sum(1) + np.exp(row.tail.astype(float))
        np.testing.assert_allclose(whole, 1, atol=2e-3)


def test_a_tail_of_nothing_is_the_floor(tiny):
    vocab_size = len(tiny[1])
    for row in score_answers(*tiny, RECORDS[:2], vocab_size):
        assert (row.tail == logits.TAIL_FLOOR).all() and row.ids.shape[1] == vocab_size


def test_a_small_tail_is_not_lost_in_rounding():
    scores = torch.tensor([[0.0, -25.0, -25.0, -40.0]])
    _, _, tail = logits._likeliest(scores, 1, 4)
    assert tail.item() == pytest.approx(-25 + np.log(2), abs=0.02)


def test_an_impossible_token_has_a_finite_logprob():
    _, logprobs, tail = logits._likeliest(torch.tensor([[0.0, -torch.inf, -torch.inf]]), 2, 3)
    assert logprobs.tolist() == [[0.0, -65504.0]] and tail.tolist() == [logits.TAIL_FLOOR]


@pytest.mark.parametrize(
    ("pass_tokens", "window_tokens", "head_cells"), [(1, 1, 1), (300, 10**6, 2000), (64, 200, 10**4)]
)
def test_batching_changes_neither_order_nor_alignment(
    exact, monkeypatch, pass_tokens, window_tokens, head_cells
):
    expected = list(score_answers(*exact, RECORDS, TOP))
    monkeypatch.setattr(logits, "PASS_TOKENS", pass_tokens)
    monkeypatch.setattr(logits, "WINDOW_TOKENS", window_tokens)
    monkeypatch.setattr(logits, "HEAD_CELLS", head_cells)
    for row, other in zip(score_answers(*exact, RECORDS, TOP), expected, strict=True):
        assert_close(row, other)


def test_a_pass_holds_no_more_tokens_than_allowed_and_only_answers_are_scored(exact, monkeypatch):
    model, tokenizer = copy.deepcopy(exact[0]), exact[1]
    passes, scored = [], []
    model.model.register_forward_pre_hook(
        lambda m, a, k: passes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda m, a, out: scored.append(out.shape[0]))
    monkeypatch.setattr(logits, "PASS_TOKENS", 100)
    monkeypatch.setattr(logits, "HEAD_CELLS", 7 * len(tokenizer))
    rows = list(score_answers(model, tokenizer, RECORDS, TOP))
    assert len(passes) < len(RECORDS)
    assert all(count == 1 or count * width <= 100 for count, width in passes)
    assert max(scored) == 7 and sum(scored) == sum(len(row.tokens) for row in rows)


def test_records_are_read_a_window_ahead_and_no_more(tiny, monkeypatch):
    monkeypatch.setattr(logits, "WINDOW_TOKENS", 200)
    taken = count()
    endless = (RECORDS[next(taken) % 2] for _ in iter(int, 1))
    assert len(list(islice(score_answers(*tiny, endless, TOP), 30))) == 30
    assert next(taken) < 45


def labelled(folder: Path, records: list[dict[str, str]] = RECORDS) -> str:
    path = folder / "train_labeled.json"
    path.write_text(json.dumps(records))
    return str(path)


def write(folder: Path, teacher: str | Path, **changes: object) -> TopLogits:
    params = label_params(**{"teacher": str(teacher), "top_logits": TOP, **changes})
    write_top_logits(params, labelled(folder), str(folder / "x.arrow"), str(folder / "label.log"))
    return TopLogits(folder / "x.arrow")


def test_the_file_has_a_row_a_record_and_the_teachers_tokenizer(tiny_model_dir, tiny, tmp_path, capsys):
    found = write(tmp_path, tiny_model_dir)
    assert (found.top, found.vocab_size, found.teacher) == (TOP, len(tiny[1]), str(tiny_model_dir))
    assert found.tokenizer == tokenizer_digest(tiny[1])
    for row, expected in zip(found, score_answers(*tiny, RECORDS, TOP), strict=True):
        assert_close(row, expected)
    assert "label: 6 of 6 answers scored, " in capsys.readouterr().err
    assert "6 of 6" in (tmp_path / "label.log").read_text()


def test_the_same_inputs_give_the_same_bytes(tiny_model_dir, tmp_path):
    before = write(tmp_path, tiny_model_dir).path.read_bytes()
    assert write(tmp_path, tiny_model_dir).path.read_bytes() == before


def test_an_output_layer_padded_beyond_the_tokenizer_gives_the_same_file(
    tiny_model_dir, tmp_path, monkeypatch
):
    files = []
    for place in ("plain", "padded"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)  # so that the teacher's name is the same
        shutil.copytree(tiny_model_dir, "teacher")
        if place == "padded":
            model, tokenizer = load_student("teacher")
            model.resize_token_embeddings(len(tokenizer) + 64)
            with torch.no_grad():  # had they a part in it, they would take it all
                model.lm_head.weight[len(tokenizer) :] = 9 * model.lm_head.weight[:64]
            save_checkpoint(model, tokenizer, "teacher")
        files.append(write(Path(), "teacher").path.read_bytes())
    assert files[0] == files[1]


def test_nothing_is_loaded_and_no_row_is_written_when_it_is_off(tmp_path):
    found = write(tmp_path, "org/not-there", top_logits=0)
    assert (len(found), found.top) == (0, 0)
    assert write(tmp_path, "gpt", top_logits=0, engine="openai").teacher == "gpt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "openai"},
            r"label\.top_logits: found 5 with label\.engine: openai, .*; take engine tran",
        ),
        (
            {"top_logits": 1000},
            r"label\.top_logits: found 1000, expected at most the 3\d\d tokens of .*; lower",
        ),
    ],
)
def test_params_that_cannot_work_are_told(tiny_model_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_top_logits(label_params(**{"teacher": str(tiny_model_dir), "top_logits": TOP, **changes}))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tiny_model_dir, **changes)
    assert not (tmp_path / "x.arrow").exists()


@pytest.mark.parametrize("top", [-1, 1025, True])
def test_the_param_has_bounds(top):
    with pytest.raises(ValueError, match="top_logits"):
        label_params(top_logits=top)


def test_an_answer_beyond_the_context_is_told_before_anything_is_scored(tiny_copy, tmp_path, monkeypatch):
    tokens = max(len(logits._tokenized(load_student(str(tiny_copy))[1], r).inputs) for r in RECORDS)
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}))
    assert len(write(tmp_path, tiny_copy)) == len(RECORDS)
    (tiny_copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens - 1}))
    monkeypatch.delattr(logits, "_score")
    with pytest.raises(
        ValueError, match=rf"record 3: prompt and answer have {tokens} tokens, expected at most"
    ):
        write(tmp_path, tiny_copy)


def test_weights_that_give_no_number_are_told(tiny_copy, tmp_path):
    model, tokenizer = load_student(str(tiny_copy))
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    save_checkpoint(model, tokenizer, tiny_copy)
    with pytest.raises(ValueError, match=r"record 0: .* gives scores that are not finite; mend"):
        write(tmp_path, tiny_copy)
    assert not (tmp_path / "x.arrow").exists()


def test_a_model_that_bends_its_scores_afterwards_is_refused(tiny):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    torch.manual_seed(0)
    for cap, message in ((0.1, "Gemma2ForCausalLM changes its scores after the output layer"), (None, "")):
        config = Gemma2Config(
            vocab_size=len(tiny[1]),
            num_attention_heads=2,
            num_key_value_heads=1,
            final_logit_softcapping=cap,
            initializer_range=0.5,
            **sizes,
        )
        model = Gemma2ForCausalLM(config).eval()
        if cap is None:
            logits._check_scores(model, tiny[1])
            continue
        with pytest.raises(ValueError, match=message):
            logits._check_scores(model, tiny[1])


def test_a_tokenizer_with_tokens_beyond_the_weights_is_refused(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(
        ValueError, match=r"scores 3\d\d tokens, expected the tokenizer's 3\d\d; take the tokenizer"
    ):
        logits._check_scores(tiny[0], tokenizer)


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_copy):
    """A folder in which the label stage can run, with a function that runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # the stages are no part of the package
    from stages import label

    (tmp_path / "data").mkdir()
    for split, records in (("train_instructions", RECORDS), ("heldout_s1", RECORDS[:1])):
        (tmp_path / f"data/{split}.json").write_text(json.dumps(records))
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["label"]

    def run(**changes: object) -> TopLogits:
        changes = {"teacher": "model", "max_new_tokens": 6, "on_truncated": "keep", **changes}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump({"label": {**section, **changes}}))
        label.main()
        return TopLogits("data/train_logits.arrow")

    return run


def test_the_stage_writes_a_row_for_each_labelled_record(project):
    found = project(top_logits=TOP)
    records = read_records("data/train_labeled.json")
    _, tokenizer = load_student("model")
    assert len(found) == len(records) > 0
    for row, record in zip(found, records, strict=True):
        assert row.tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.tokens[:-1]) == record["output"]
    labels = Path("data/train_labeled.json").read_bytes(), Path("metrics/label.json").read_bytes()
    assert len(project(top_logits=0)) == 0
    assert labels == (Path("data/train_labeled.json").read_bytes(), Path("metrics/label.json").read_bytes())


def test_the_stage_refuses_before_it_asks_anything(project):
    with pytest.raises(ValueError, match=r"label\.top_logits: found 1000"):
        project(top_logits=1000)
    assert not Path("work").exists() and not Path("data/train_labeled.json").exists()
    with pytest.raises(ValueError, match=r"label\.top_logits: found 5 with label\.engine: openai"):
        project(top_logits=TOP, engine="openai", base_url="http://localhost:1/v1")
    assert not Path("work").exists()

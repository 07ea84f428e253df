import copy
import json
import multiprocessing
import os
import shutil
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import ROOT, label_params
from trainings import dies_at, exit_code, in_fork

from distill_app.core.files import read_records
from distill_app.core.logits import STEP, TAIL_FLOOR, TopLogits, TopRow, tokenizer_digest
from distill_app.core.models import load_student, load_trainable, save_checkpoint
from distill_app.labeling import logits
from distill_app.labeling.likelihood import ReadText
from distill_app.labeling.logits import check_logits, check_top_logits, tokenized, write_top_logits

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
    """The tiny model in float32."""
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


def score_answers(model, tokenizer, records, top: int) -> list[TopRow]:
    rows = [tokenized(tokenizer, record, "system1") for record in records]
    return logits.score_answers(model, rows, top, len(tokenizer))


def assert_close(found: TopRow, expected: TopRow, atol: float = 1e-4) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=atol)
    np.testing.assert_allclose(found.tail, expected.tail, rtol=0, atol=atol)


@pytest.mark.parametrize("top", [1, TOP, 380])
def test_each_row_is_what_a_plain_loop_in_float64_finds(exact, top):
    for record, row in zip(RECORDS, score_answers(*exact, RECORDS, top), strict=True):
        tokens, every = reference(*exact, record)
        assert row.tokens.tolist() == tokens
        assert row.ids.shape == row.logprobs.shape == (len(tokens), top)
        order = np.argsort(-every, axis=1)
        np.testing.assert_allclose(
            row.logprobs, np.take_along_axis(every, order[:, :top], 1), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            row.logprobs, np.take_along_axis(every, row.ids.astype(int), 1), rtol=1e-4, atol=1e-4
        )
        assert all(len(set(ids)) == top for ids in row.ids.tolist())
        rest = np.take_along_axis(every, order[:, top:], 1)
        np.testing.assert_allclose(row.tail, np.log(np.exp(rest).sum(1)), rtol=1e-4, atol=1e-4)


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
        assert (row.tail == TAIL_FLOOR).all() and row.ids.shape[1] == vocab_size


def test_a_small_tail_is_not_lost_in_rounding():
    scores = torch.tensor([[0.0, -25.0, -25.0, -40.0]])
    _, _, tail = logits._likeliest(scores, 1, 4)
    assert tail.item() == pytest.approx(-25 + np.log(2), abs=0.02)


def test_an_impossible_token_has_a_finite_logprob():
    _, logprobs, tail = logits._likeliest(torch.tensor([[0.0, -torch.inf, -torch.inf]]), 2, 3)
    assert logprobs.tolist() == [[0.0, TAIL_FLOOR]] and tail.tolist() == [TAIL_FLOOR]


@pytest.mark.parametrize(
    "values", [[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0], [torch.inf] * 3, [-torch.inf] * 3]
)
def test_logits_that_are_not_finite_give_no_number(values):
    _, _, tail = logits._likeliest(torch.tensor([[0.0, 1.0, 2.0], values]), 1, 3)
    assert tail.isnan().tolist() == [False, True]


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


def test_answers_are_read_a_window_ahead_and_no_more(monkeypatch):
    monkeypatch.setattr(logits, "WINDOW_TOKENS", 200)
    taken = count()
    endless = (ReadText([0] * (next(taken) % 50), 0) for _ in iter(int, 1))
    windows = list(islice(logits._windows(endless), 5))
    assert sum(map(len, windows)) == next(taken)
    assert all(200 <= sum(len(row.ids) for row in window) < 250 for window in windows)


def labelled(folder: Path, records: list[dict[str, str]] = RECORDS) -> str:
    path = folder / "train_labeled.json"
    path.write_text(json.dumps(records))
    return str(path)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The folder of what is scored so far, for one test alone."""
    monkeypatch.setattr(logits, "WORK_DIR", tmp_path / "work/logits")
    return tmp_path / "work/logits"


def write(folder: Path, teacher: str | Path, records=RECORDS, **changes: object) -> TopLogits:
    params = label_params(**{"teacher": str(teacher), "top_logits": TOP, **changes})
    write_top_logits(params, labelled(folder, records), str(folder / "x.arrow"), str(folder / "label.log"))
    return TopLogits(folder / "x.arrow")


def test_the_file_has_a_row_a_record_and_the_teachers_tokenizer(tiny_model_dir, tiny, tmp_path, capsys):
    found = write(tmp_path, tiny_model_dir)
    assert (found.top, found.vocab_size, found.teacher) == (TOP, len(tiny[1]), str(tiny_model_dir))
    assert found.tokenizer == tokenizer_digest(tiny[1])
    for row, expected in zip(found, score_answers(*tiny, RECORDS, TOP), strict=True):
        assert_close(row, expected, STEP / 2 + 1e-4)
    assert "label: 6 of 6 answers scored, " in capsys.readouterr().err
    assert "6 of 6" in (tmp_path / "label.log").read_text()


def test_answers_are_scored_under_the_system_prompt_that_they_were_given_under(tiny_model_dir, tmp_path):
    for name, text in (("plain", None), ("told", "Be brief."), ("again", "Be brief.")):
        params = label_params(teacher=str(tiny_model_dir), top_logits=TOP, system_prompt=text)
        (tmp_path / name).mkdir()
        write_top_logits(
            params, labelled(tmp_path), str(tmp_path / name / "x.arrow"), str(tmp_path / "label.log")
        )
    plain, told, again = ((tmp_path / name / "x.arrow").read_bytes() for name in ("plain", "told", "again"))
    assert plain != told == again


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
    before = found.path.read_bytes()
    assert write(tmp_path, "gpt", top_logits=0, engine="openai").path.read_bytes() == before


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
    tokens = max(len(tokenized(load_student(str(tiny_copy))[1], r, "system1").inputs) for r in RECORDS)
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
    message = r"record 0: found logits of .* that are NaN or infinite, expected numbers; check its weights"
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tiny_copy)
    assert not (tmp_path / "x.arrow").exists()


def test_a_model_that_changes_its_logits_afterwards_is_refused(tiny):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    torch.manual_seed(0)
    for cap, message in ((0.1, "label.top_logits: Gemma2ForCausalLM changes its logits after"), (None, "")):
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
            check_logits(model, tiny[1], "label.top_logits")
            continue
        with pytest.raises(ValueError, match=message):
            check_logits(model, tiny[1], "label.top_logits")


def test_a_tokenizer_with_tokens_beyond_the_weights_is_refused(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(
        ValueError, match=r"has logits of 3\d\d tokens, expected the tokenizer's 3\d\d; take the tokenizer"
    ):
        check_logits(tiny[0], tokenizer, "label.top_logits")


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 2, 4])
def test_a_killed_scoring_goes_on_to_the_same_bytes_and_scores_nothing_twice(
    tiny_model_dir, tmp_path, monkeypatch, work, killed_at
):
    monkeypatch.setattr(logits, "WINDOW_TOKENS", 1)  # a window an answer
    unbroken = write(tmp_path, tiny_model_dir).path
    expected = unbroken.read_bytes()
    assert not list(work.glob("*"))
    unbroken.unlink()
    with monkeypatch.context() as patch:
        dies_at(patch, logits, "_score", killed_at, after=False)
        assert exit_code(in_fork(lambda: write(tmp_path, tiny_model_dir), str(tmp_path / "fork.log"))) == -9
    assert not unbroken.exists() and len(list(work.glob("*/*.arrow"))) == killed_at - 1
    scored = counted(monkeypatch, logits, "_score")
    assert write(tmp_path, tiny_model_dir).path.read_bytes() == expected
    assert len(scored) == len(RECORDS) - killed_at + 1
    assert not list(work.glob("*"))
    log = (tmp_path / "label.log").read_text().splitlines()[-1]
    assert "6 of 6 answers scored, " in log
    assert (f"{killed_at - 1} of them by an earlier run" in log) == (killed_at > 1)


def test_a_run_killed_before_the_last_file_was_written_loads_no_model(tiny_model_dir, tmp_path, monkeypatch):
    expected = write(tmp_path, tiny_model_dir).path.read_bytes()
    with monkeypatch.context() as patch:
        dies_at(patch, logits, "join_top_logits", 1, after=False)
        assert exit_code(in_fork(lambda: write(tmp_path, tiny_model_dir), str(tmp_path / "fork.log"))) == -9
    monkeypatch.delattr(logits, "load_teacher")
    assert write(tmp_path, tiny_model_dir).path.read_bytes() == expected


@pytest.mark.parametrize("change", ["top", "answer", "weights"])
def test_what_another_run_scored_is_not_taken_for_this_ones(tiny_copy, tmp_path, monkeypatch, work, change):
    """Else a change between a kill and the next run would go unseen."""
    with monkeypatch.context() as patch:
        dies_at(patch, logits, "join_top_logits", 1, after=False)
        assert exit_code(in_fork(lambda: write(tmp_path, tiny_copy), str(tmp_path / "fork.log"))) == -9
    assert len(list(work.glob("*/*.arrow"))) == 1
    if change == "weights":
        model, tokenizer = load_student(str(tiny_copy))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        save_checkpoint(model, tokenizer, tiny_copy)
    records = [*RECORDS[:-1], {**RECORDS[-1], "output": "y"}] if change == "answer" else RECORDS
    scored = counted(monkeypatch, logits, "_score")
    found = write(tmp_path, tiny_copy, records, top_logits=TOP - (change == "top"))
    assert scored
    for row, expected in zip(
        found, score_answers(*load_student(str(tiny_copy)), records, found.top), strict=True
    ):
        assert_close(row, expected, STEP / 2 + 1e-4)


def counted(monkeypatch, module, name) -> list[str]:
    """Have the calls of a function counted."""
    real, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or real(*a, **k))
    return calls


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logits, "WINDOW_TOKENS", 100)
    expected = write(tmp_path, tiny_model_dir).path.read_bytes()
    here = counted(monkeypatch, logits, "_score")
    assert write(tmp_path, tiny_model_dir, engine_workers=2).path.read_bytes() == expected
    assert not here and "6 of 6 answers scored" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_of_another_process_is_told_here(tiny_copy, tmp_path):
    model, tokenizer = load_student(str(tiny_copy))
    with torch.no_grad():
        model.lm_head.weight[0] = torch.inf
    save_checkpoint(model, tokenizer, tiny_copy)
    with pytest.raises(ValueError, match="record 0: found logits of .* that are NaN or infinite"):
        write(tmp_path, tiny_copy, engine_workers=2)


def test_each_process_has_gpus_of_its_own(monkeypatch):
    started = multiprocessing.Value("i", 0)
    monkeypatch.setattr(logits, "die_with_parent", lambda: None)
    for visible, expected in (("", ["0,1", "2,3"]), ("4,5,6,7,8,9,10,11", ["8,9", "10,11"])):
        for gpus in expected:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            logits._take_gpus(started, 2)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == gpus
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for workers, gpus, found in ((1, 1, (1, 0)), (4, 2, (4, 2)), (9, 2, (4, 2)), (2, 1, (2, 1))):
        assert logits._processes(label_params(engine_workers=workers, gpus_per_worker=gpus)) == found


def test_traces_are_scored_after_the_prompt_of_their_system(tiny_model_dir, tiny, tmp_path, monkeypatch):
    found = []
    for mode in ("system1", "system2"):
        path = str(tmp_path / f"{mode}.arrow")
        params = label_params(teacher=str(tiny_model_dir), top_logits=TOP)
        assert write_top_logits(params, labelled(tmp_path), path, str(tmp_path / "log"), mode) == len(RECORDS)
        found.append(TopLogits(path))
    rows = [tokenized(tiny[1], record, "system2") for record in RECORDS]
    assert "Think step by step." in tiny[1].decode(rows[0].ids[: rows[0].start])
    expected = logits.score_answers(tiny[0], rows, TOP, len(tiny[1]))
    for one, two, row in zip(*found, expected, strict=True):
        assert_close(two, row, STEP / 2 + 1e-4)
        assert not np.array_equal(one.ids, two.ids) and np.array_equal(one.tokens, two.tokens)
    assert "score_s2: 6 of 6 answers scored" in (tmp_path / "log").read_text()
    with pytest.raises(ValueError, match=r"score_s2\.top_logits: found 5 with label\.engine: openai"):
        check_top_logits(params.model_copy(update={"engine": "openai"}), "system2")


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_copy):
    """A folder in which the label stage can run, with a function that runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logits, "WORK_DIR", "work/logits")
    monkeypatch.syspath_prepend(str(ROOT))  # the stages are no part of the package
    from stages import label, score_s2

    (tmp_path / "data").mkdir()
    for split, records in (("train_instructions", RECORDS), ("heldout_s1", RECORDS[:1])):
        (tmp_path / f"data/{split}.json").write_text(json.dumps(records))
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["label"]

    def run(traces: int | None = None, **changes: object) -> TopLogits:
        changes = {"teacher": "model", "max_new_tokens": 6, "on_truncated": "keep", **changes}
        params = {"label": {**section, **changes}, "score_s2": {"top_logits": traces}}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        if traces is None:
            label.main()
            return TopLogits("data/train_logits.arrow")
        score_s2.main()
        return TopLogits("data/traces_logits.arrow")

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


def test_the_stage_of_system2_scores_the_traces_and_is_free_when_it_is_off(project, capsys):
    Path("data/omnithought_cot.json").write_text(json.dumps(RECORDS))
    found = project(traces=TOP)
    assert (len(found), found.top) == (len(RECORDS), TOP)
    assert "score_s2: 6 traces scored by the teacher" in capsys.readouterr().out
    shutil.rmtree("model")  # not even a tokenizer is loaded
    Path("data/omnithought_cot.json").unlink()
    off = project(traces=0)
    assert len(off) == 0 and "score_s2: off, top_logits is 0" in capsys.readouterr().out
    before = off.path.read_bytes()
    assert project(traces=0, teacher="org/another").path.read_bytes() == before  # so that no training reruns

import copy

import pytest
import torch
from conftest import make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from distill_app import infer_student, label_with_teacher, load_student
from distill_app.core.errors import EngineGone
from distill_app.core.prompts import format_prompt
from distill_app.labeling.answers import Answer, Sampling
from distill_app.labeling.engine import LOOK_AHEAD, _Batch, generate, stop_tokens, stream_answers
from distill_app.labeling.label import select_answers
from distill_app.labeling.memory import rows_that_fit
from distill_app.labeling.slots import Slots

PROMPTS = ["Name three", "Step 1:", "The quick brown fox jumps over", "x", "Think step by step."]


def reference_greedy(model, tokenizer, prompt, limit):
    """transformers' own generate, one prompt at a time."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def exact(tiny):
    """A float32 copy, in which no rounding flips a token."""
    return copy.deepcopy(tiny[0]).float(), tiny[1]


def test_greedy_answers_equal_those_of_transformers(exact):
    model, tokenizer = exact
    answers = generate(model, tokenizer, PROMPTS, Sampling(24), batch_size=3)
    assert [a.text for a in answers] == [reference_greedy(model, tokenizer, p, 24) for p in PROMPTS]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """In bfloat16, with products above 4096 multiplications: torch has other kernels below."""
    return load_student(str(make_tiny_model(tmp_path_factory.mktemp("wide") / "model", size=128)))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.9, 0.8), (0.9, 1.0)])
@pytest.mark.parametrize("model", ["wide", "exact"])
def test_an_answer_does_not_depend_on_its_batch(model, temperature, top_p, request):
    model, tokenizer = request.getfixturevalue(model)
    sampling = Sampling(24, temperature, top_p, seed=5)
    prompts = PROMPTS + [f"Input: the quick brown {n}" for n in range(20)]  # a common head in some batches
    together = generate(model, tokenizer, prompts, sampling, batch_size=len(prompts))
    alone = [generate(model, tokenizer, [p], sampling)[0] for p in prompts]
    turned = generate(model, tokenizer, prompts[::-1], sampling, batch_size=3)[::-1]
    assert together == alone == turned


def test_a_head_that_prompts_share_is_computed_once_and_changes_no_answer(exact, monkeypatch):
    model, tokenizer = exact
    prompts = [f"the quick brown fox jumps over the lazy dog {n}" for n in range(6)]
    passes = []
    forward = type(model).forward

    def counting(self, input_ids, **options):
        passes.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    shared = generate(model, tokenizer, prompts, Sampling(8))
    tokens_shared = passes[0] + passes[1]
    monkeypatch.setattr("distill_app.labeling.engine.HEAD_MIN", 10_000)
    passes.clear()
    assert generate(model, tokenizer, prompts, Sampling(8)) == shared
    assert tokens_shared < passes[0] / 2


def test_another_seed_gives_other_samples(tiny):
    one, two = (generate(*tiny, PROMPTS, Sampling(24, 1.0, 1.0, seed=seed)) for seed in (1, 2))
    assert one != two


def test_a_prompt_that_waits_takes_the_place_of_an_answer_that_ends(tiny, monkeypatch):
    """Each row ends after as many tokens as its prompt has; three run at a time."""
    model, tokenizer = tiny
    prompts = ["a" * n for n in (1, 2, 5, 9, 9, 3)]
    lengths = [len(tokenizer(p)["input_ids"]) for p in prompts]
    rows_a_pass = []

    def choose(logits, draws, sampling):
        rows_a_pass.append(len(logits))
        rows = list(batch.rows.values())
        assert len(rows) == len(logits)
        return [
            tokenizer.eos_token_id if len(row.out) + 1 >= lengths[row.place] else 50
            for row in sorted(rows, key=lambda r: not r.out)
        ]

    monkeypatch.setattr("distill_app.labeling.engine.choose", choose)
    batch = _Batch(model, tokenizer, prompts, Sampling(20), batch_size=3)
    answers = dict(batch.run())
    assert [answers[n].tokens for n in range(6)] == lengths
    assert {a.finish_reason for a in answers.values()} == {"stop"}
    assert rows_a_pass[:3] == [3, 3, 3] and max(rows_a_pass) == 3
    assert sum(rows_a_pass) == sum(lengths)  # no token was computed for a row that had ended


def test_prompts_are_read_only_a_little_ahead(tiny):
    read = []

    def prompts():
        for n in range(1000):
            read.append(n)
            yield f"prompt {n}"

    answers = stream_answers(*tiny, prompts(), Sampling(2), batch_size=4)
    next(answers)
    assert len(read) <= 4 * (LOOK_AHEAD + 1)
    assert len(list(answers)) == 999 and len(read) == 1000


def test_a_prompt_without_room_for_an_answer_is_refused_and_a_short_room_cuts(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    words = "".join(chr(33 + n) for n in range(60))  # a token each
    lengths = [len(tokenizer(words[:n])["input_ids"]) for n in (5, 16, 40)]
    answers = generate(
        model, tokenizer, [words[:5], words[:16], words[:40], ""], Sampling(12, stop_at_eos=False)
    )
    assert [a.finish_reason for a in answers] == ["length", "length", "refused", "refused"]
    assert answers[0].tokens == 12 and answers[1].tokens == 20 - lengths[1]
    assert answers[2] == Answer("", 0, "refused", lengths[2])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_when_memory_runs_out_the_batch_is_halved_and_the_answers_stay(tiny, monkeypatch, capsys, error):
    model, tokenizer = tiny
    prompts = [f"prompt {n}" for n in range(9)]
    sampling = Sampling(12, 0.8, 0.9, seed=3)
    expected = generate(model, tokenizer, prompts, sampling)
    attend = Slots.attend

    def full(self, *args):
        if self.count > 2 and self.width and self._packed_on(args[1].device).running.numel() > 2:
            raise error
        return attend(self, *args)

    monkeypatch.setattr(Slots, "attend", full)
    assert generate(model, tokenizer, prompts, sampling, batch_size=8) == expected
    assert "out of memory; going on with 2 answers at a time" in capsys.readouterr().err


def test_memory_that_does_not_hold_one_row_ends_with_advice(tiny, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Slots, "attend", full)
    with pytest.raises(RuntimeError, match="out of memory with one prompt of .* lower max_new_tokens"):
        generate(*tiny, PROMPTS, Sampling(4), batch_size=4)


def test_memory_that_does_not_hold_the_common_head_ends_with_advice(tiny, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Slots, "attend", full)
    prompts = [f"the quick brown fox jumps over the lazy dog {n}" for n in range(6)]
    with pytest.raises(EngineGone, match="out of memory with one prompt of"):
        generate(*tiny, prompts, Sampling(4), batch_size=4)


def test_a_longer_prompt_later_in_the_stream_gets_slots_of_its_own(exact, monkeypatch):
    """The slots are sized by the longest prompt known; 9 tokens of memory a row are planned anew for more."""
    model, tokenizer = exact
    prompts = [f"p{n}" for n in range(20)] + ["x" * 300] + [f"q{n}" for n in range(4)]
    planned = []
    monkeypatch.setattr(
        "distill_app.labeling.engine.rows_that_fit", lambda _, tokens: planned.append(tokens) or 3
    )
    answers = generate(model, tokenizer, prompts, Sampling(6), batch_size=4)
    assert [a.text for a in answers] == [reference_greedy(model, tokenizer, p, 6) for p in prompts]
    assert len(planned) == 2 and planned[1] > planned[0] + 100


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_stream(tiny):
    prompts = ["a", *("the quick brown fox " * 3 + str(n) for n in range(200))]
    order = [place for place, _ in stream_answers(*tiny, iter(prompts), Sampling(2), batch_size=4)]
    assert order.index(0) <= 4 * (LOOK_AHEAD + 1)


def test_another_failure_is_not_taken_for_full_memory(tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Slots, "attend", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        generate(*tiny, PROMPTS, Sampling(4))


def test_batches_are_sized_to_the_free_memory(tiny, monkeypatch):
    model = tiny[0]
    row = 2 * 4 * 2 * 8 * 2 * 100  # keys and values, layers, heads, size, bytes, tokens
    monkeypatch.setattr("distill_app.labeling.memory._free_bytes", lambda _: 2 * row * 7)
    assert rows_that_fit(model, 100) == 7
    monkeypatch.setattr("distill_app.labeling.memory._free_bytes", lambda _: 0)
    assert rows_that_fit(model, 100) == 1


def test_a_model_keeps_its_own_attention_for_others(tiny):
    before = tiny[0].config._attn_implementation
    generate(*tiny, ["a"], Sampling(2))
    assert tiny[0].config._attn_implementation == before


def test_a_model_with_another_kind_of_layer_is_named(tiny, monkeypatch):
    monkeypatch.setattr(tiny[0].config, "layer_types", ["full_attention", "linear_attention"], raising=False)
    with pytest.raises(ValueError, match="linear_attention.*label.engine: vllm or openai"):
        generate(*tiny, ["a"], Sampling(2))


def test_every_stop_token_of_the_model_ends_an_answer(tiny, monkeypatch):
    monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", [7, 9])
    assert stop_tokens(*tiny) == {7, 9, tiny[1].eos_token_id}


def tiny_of(kind, tokenizer, **options):
    torch.manual_seed(3)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options)).eval()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}),
        ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    ],
)
def test_other_architectures_answer_as_in_transformers(tiny, kind, options):
    model = tiny_of(kind, tiny[1], **options)
    answers = generate(model, tiny[1], PROMPTS, Sampling(16), batch_size=3)
    assert [a.text for a in answers] == [reference_greedy(model, tiny[1], p, 16) for p in PROMPTS]


def test_an_answer_at_the_limit_is_marked_cut(tiny):
    answer = generate(*tiny, ["Name three"], Sampling(1))[0]
    assert (answer.tokens, answer.finish_reason) == (1, "length")


def test_for_measuring_speed_every_answer_runs_to_the_limit(tiny, monkeypatch):
    eos = tiny[1].eos_token_id
    monkeypatch.setattr("distill_app.labeling.engine.choose", lambda logits, *_: [eos] * len(logits))
    assert generate(*tiny, ["a"], Sampling(5))[0].tokens == 1
    assert generate(*tiny, ["a"], Sampling(5, stop_at_eos=False))[0].tokens == 5


def test_no_prompts_give_no_answers(tiny):
    assert generate(*tiny, [], Sampling(4)) == []


def test_labels_come_in_order_and_keep_instruction_and_input(exact):
    items = [
        {"instruction": "a", "input": "b"},
        {"instruction": "c"},
        {"instruction": "a", "input": "b"},
    ]
    labeled = label_with_teacher(*exact, items, max_new_tokens=8)
    assert [(r["instruction"], r["input"]) for r in labeled] == [("a", "b"), ("c", ""), ("a", "b")]
    assert labeled[0]["output"] == labeled[2]["output"]
    assert labeled == label_with_teacher(*exact, items, max_new_tokens=8, batch_size=1)


def test_cut_and_empty_answers_are_dropped_and_counted():
    items = [{"instruction": str(n), "input": ""} for n in range(4)]
    answers = [
        Answer("yes", 2, "stop"),
        Answer("no", 9, "length"),
        Answer("", 1, "stop"),
        Answer("k", 4, "stop"),
    ]
    kept, counts = select_answers(items, answers, "drop")
    assert [r["output"] for r in kept] == ["yes", "k"]
    assert counts["dropped"] == {"empty": 1, "truncated": 1, "refused": 0}
    assert counts["instructions"] == 4 and counts["tokens_out"] == 16
    assert len(select_answers(items, answers, "keep")[0]) == 3


def test_a_student_is_asked_in_the_words_of_format_prompt(tiny, monkeypatch):
    asked = []

    def fake(model, tokenizer, prompts, sampling):
        asked.extend(prompts)
        return [Answer("Fine.", 2, "stop")]

    monkeypatch.setattr("distill_app.labeling.infer.generate", fake)
    assert infer_student(*tiny, "How are you?", mode="system2", max_new_tokens=7) == "Fine."
    assert asked == [format_prompt("How are you?", mode="system2")]

import copy
import re

import pytest
import torch
from conftest import make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from distill_app import infer_student, label_with_teacher, load_student
from distill_app.core.errors import EngineGone
from distill_app.core.prompts import format_prompt
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.batch import LOOK_AHEAD, _Batch, generate, stop_tokens, stream_answers
from distill_app.generation.memory import tokens_that_fit
from distill_app.generation.slots import FUSED_FROM, QUERIES, Look, Slots, _attend_prompt, width_for
from distill_app.labeling.store import AnswerStore

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
@pytest.mark.parametrize("model", [pytest.param("wide", marks=pytest.mark.slow), "exact"])
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
    monkeypatch.setattr("distill_app.generation.batch.HEAD_MIN", 10_000)
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
        rows = [batch.rows[place] for place in batch.slots.in_order(batch.rows)]
        assert len(rows) == len(logits)
        entering = [row for row in batch.rows.values() if not row.out]
        return [
            tokenizer.eos_token_id if len(row.out) + 1 >= lengths[row.place] else 50
            for row in [*(row for row in rows if row.out), *entering]
        ]

    monkeypatch.setattr("distill_app.generation.batch.choose", choose)
    batch = _Batch(model, tokenizer, prompts, Sampling(20), batch_size=3, on_token=None)
    answers = dict(batch.run())
    assert [answers[n].tokens for n in range(6)] == lengths
    assert {a.finish_reason for a in answers.values()} == {"stop"}
    assert rows_a_pass[:3] == [3, 3, 3] and max(rows_a_pass) == 3
    assert sum(rows_a_pass) == sum(lengths)  # no token was computed for a row that had ended


@pytest.mark.slow
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
        if sum(len(some.slots) for some in self._running_on(args[1].device)) > 2:
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


@pytest.mark.slow
def test_memory_that_does_not_hold_the_common_head_ends_with_advice(tiny, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Slots, "attend", full)
    prompts = [f"the quick brown fox jumps over the lazy dog {n}" for n in range(6)]
    with pytest.raises(EngineGone, match="out of memory with one prompt of"):
        generate(*tiny, prompts, Sampling(4), batch_size=4)


def test_a_longer_prompt_later_in_the_stream_fits_in(exact, monkeypatch):
    model, tokenizer = exact
    prompts = [f"p{n}" for n in range(20)] + ["x" * 300] + [f"q{n}" for n in range(4)]
    monkeypatch.setattr("distill_app.generation.batch.tokens_that_fit", lambda _: 3 * 64)
    answers = generate(model, tokenizer, prompts, Sampling(6), batch_size=4)
    assert [a.text for a in answers] == [reference_greedy(model, tokenizer, p, 6) for p in prompts]


def passes_for(tiny, prompts, monkeypatch, batch_size=128):
    """Return how many rows each pass held."""
    rows = []
    monkeypatch.setattr(
        "distill_app.generation.batch.choose",
        lambda logits, *_: rows.append(len(logits)) or [50] * len(logits),
    )
    answers = generate(*tiny, prompts, Sampling(8, stop_at_eos=False), batch_size)
    assert len(answers) == len(prompts)
    return rows


def test_a_long_prompt_takes_no_memory_from_the_short_ones(tiny, monkeypatch):
    """Memory for 2,000 tokens; a row of 900 and 8 of them leaves room for 15 short ones meanwhile."""
    monkeypatch.setattr("distill_app.generation.batch.tokens_that_fit", lambda _: 2000)
    short = [f"prompt {n}" for n in range(600)]
    words = "".join(chr(33 + n % 90) for n in range(900))
    alone = passes_for(tiny, short, monkeypatch)
    beside = passes_for(tiny, [words, *short], monkeypatch)
    assert max(alone) == 2000 // 64
    assert len(beside) <= len(alone) + 2 * 8


def test_a_row_grows_into_a_free_slot_that_a_pass_has_made():
    """What inference mode has made, nothing outside of it may write."""
    slots = Slots()
    slots.arrange({1: 100, 2: 100, 3: 100, 4: 60})
    with torch.inference_mode():
        for width in (64, 128):
            for half in slots._pools[width].of_layer(0, torch.zeros(1, 2, 8)):
                half.fill_(width)
    slots.arrange({1: 101, 2: 101, 4: 65})  # the third row has ended
    pool = slots._pools[128]
    assert list(slots._pools) == [128] and sorted(pool.rows) == [1, 2, 4]
    for half in pool.layers[0]:
        assert (half[pool.rows.index(1)] == 128).all()
        assert (half[pool.rows.index(4), :, :64] == 64).all()


def test_memory_is_held_by_each_row_as_long_as_it_is(tiny, monkeypatch):
    held = []
    arrange = Slots.arrange

    def watched(self, lengths):
        arrange(self, lengths)
        held.append((self.tokens, sum(map(width_for, lengths.values()))))

    monkeypatch.setattr(Slots, "arrange", watched)
    prompts = ["x" * 900, *(f"prompt {n}" for n in range(40))]
    generate(*tiny, prompts, Sampling(80, stop_at_eos=False), batch_size=16)
    assert all(tokens <= needed / 0.6 for tokens, needed in held)
    assert max(tokens for tokens, _ in held) < 16 * 900 / 2


@pytest.mark.parametrize("length", [1, 64, 65, 256, 257, 700, 1024, 5000, 100_000])
def test_a_slot_is_little_wider_than_its_row(length):
    assert length <= width_for(length) <= max(length + 63, 1.25 * length)
    assert width_for(width_for(length)) == width_for(length)


@pytest.mark.slow
def test_after_memory_ran_out_the_batch_grows_back(tiny, monkeypatch, capsys):
    """Something else takes the memory for a while: two rows fit, and later all again."""
    model, tokenizer = tiny
    prompts = [f"prompt {n}" for n in range(40)]
    sampling = Sampling(12, 0.8, 0.9, seed=3, stop_at_eos=False)
    expected = generate(model, tokenizer, prompts, sampling)
    monkeypatch.setattr("distill_app.generation.batch.GROW_AFTER", 3)
    attend, passes = Slots.attend, []

    def scarce(self, layer, *args):
        rows = sum(len(some.slots) for some in self._running_on(args[0].device))
        passes.extend([rows] if not layer else [])
        if rows > 2 and len(passes) < 60:
            raise MemoryError
        return attend(self, layer, *args)

    monkeypatch.setattr(Slots, "attend", scarce)
    assert generate(model, tokenizer, prompts, sampling, batch_size=8) == expected
    assert max(passes[60:]) == 8
    failed = sum(rows > 2 for rows in passes[:60])
    assert failed <= 6  # it tries again ever more seldom
    assert "out of memory; going on with 2 answers at a time" in capsys.readouterr().err


def test_a_prompt_that_fits_not_even_alone_is_refused_and_the_rest_goes_on(tiny, monkeypatch, capsys):
    """It enters alone, being longer than what one pass reads of prompts."""
    model, tokenizer = tiny
    monkeypatch.setattr(model.config, "max_position_embeddings", 8192)
    words = "".join(chr(33 + n % 90) for n in range(2600))
    prompts = [f"prompt {n}" for n in range(8)]
    expected = generate(model, tokenizer, prompts, Sampling(6))
    attend = Slots.attend

    def one_slot(self, layer, query, *args):
        if query.shape[2] > 1000 or sum(len(some.slots) for some in self._running_on(query.device)) > 1:
            raise MemoryError
        return attend(self, layer, query, *args)

    monkeypatch.setattr(Slots, "attend", one_slot)
    answers = generate(model, tokenizer, [*prompts[:4], words, *prompts[4:]], Sampling(6), batch_size=8)
    tokens = len(tokenizer(words)["input_ids"])
    assert tokens > 2048
    assert answers.pop(4) == Answer("", 0, "refused", tokens, lasting=False)
    assert answers == expected
    said = capsys.readouterr().err
    assert f"a prompt of {tokens} tokens finds no room even alone; left out as refused: '!" in said


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


def test_rows_are_as_many_as_the_free_memory_holds(tiny, monkeypatch):
    model = tiny[0]
    token = 2 * 4 * 2 * 8 * model.dtype.itemsize  # keys and values, layers, heads, size, bytes
    monkeypatch.setattr("distill_app.generation.memory._free_bytes", lambda _: 2 * token * 7)
    assert tokens_that_fit(model) == 7


def attention_reference(query, keys, values, look):
    """In float64, `(tokens, kv_heads, groups, size)` as `_attend_prompt` returns it."""
    query, keys, values = query.double(), keys.double(), values.double()
    scores = torch.einsum("hgqd,hkd->hgqk", query, keys) * look.scaling
    if look.softcap is not None:
        scores = torch.tanh(scores / look.softcap) * look.softcap
    width, tokens = keys.shape[1], query.shape[2]
    ages = torch.arange(width - tokens, width)[:, None] - torch.arange(width)
    hidden = (ages < 0) | (ages >= (look.window or width))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hgqk,hkd->qhgd", weights, values)


LOOKS = [Look(0.3), Look(0.3, window=100), Look(0.3, softcap=1.0), Look(0.3, window=700, softcap=2.0)]


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("width", [40, FUSED_FROM - 1, FUSED_FROM, FUSED_FROM + 1, 1100])
def test_a_prompt_sees_what_it_should_and_the_same_behind_a_shared_head(look, width):
    generator = torch.Generator().manual_seed(width)
    query, keys, values = (torch.randn(2, n, width, 16, generator=generator).bfloat16() for n in (3, 1, 1))
    keys, values = keys[:, 0], values[:, 0]
    seen = _attend_prompt(query, keys, values, look)
    assert (seen - attention_reference(query, keys, values, look)).abs().max() < 0.05
    for shared in {8, 127, width // 2, 511, 512, 513, width - 2} & set(range(1, width - 1)):
        rest = _attend_prompt(query[:, :, shared:], keys, values, look)
        assert torch.equal(rest, seen[shared:])


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_a_long_prompts_memory_does_not_grow_with_its_square(look):
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, tuple) else (out,)) if hasattr(t, "numel")
            )
            return out

    width, heads = 4096, 2
    query, keys = torch.randn(1, heads, width, 8).bfloat16(), torch.randn(1, width, 8).bfloat16()
    with Watch():
        _attend_prompt(query, keys, keys, look)
    assert max(sizes) <= heads * QUERIES * width
    if look.window is None and look.softcap is None:
        assert max(sizes) <= heads * width * 8


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


@pytest.fixture
def longrope(tiny):
    """A model of the Phi-3 kind whose frequencies differ from 32 tokens on, by factors that tell."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
    }
    more = {"rope_parameters": rope, "original_max_position_embeddings": 32, "max_position_embeddings": 512}
    return tiny_of("phi3", tiny[1], **more), tiny[1]


def test_a_longrope_models_answers_do_not_depend_on_long_ones_beside_them(longrope):
    """One prompt is long, one becomes so, the others are short."""
    model, tokenizer = longrope
    prompts = [
        "a b c",
        "x",
        "".join(chr(33 + n) for n in range(60)),
        "zqxjwvkpbdhgzqx",
    ]
    tokens = [len(tokenizer(p)["input_ids"]) for p in prompts]
    assert tokens[2] > 32 and tokens[1] + 26 < 32 < tokens[3] + 20
    sampling = Sampling(26, stop_at_eos=False)
    together = generate(model, tokenizer, prompts, sampling)
    assert together == [generate(model, tokenizer, [p], sampling)[0] for p in prompts]
    alone = [
        model.generate(**tokenizer(p, return_tensors="pt"), max_new_tokens=26, do_sample=False)
        for p in prompts
    ]
    texts = [
        tokenizer.decode(a[0, n:], skip_special_tokens=True).strip()
        for a, n in zip(alone, tokens, strict=True)
    ]
    ended = [tokenizer.eos_token_id in a[0, n:] for a, n in zip(alone, tokens, strict=True)]
    assert [a.text for a, e in zip(together, ended, strict=True) if not e] == [
        t for t, e in zip(texts, ended, strict=True) if not e
    ]
    assert not all(ended)


def test_repetition_is_penalized_as_in_transformers(exact):
    model, tokenizer = exact
    answers = generate(model, tokenizer, PROMPTS, Sampling(24, repetition_penalty=1.4), batch_size=3)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False, repetition_penalty=1.4)
        expected.append(
            tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    assert [a.text for a in answers] == expected
    assert answers != generate(model, tokenizer, PROMPTS, Sampling(24), batch_size=3)


def test_an_answer_ends_before_a_stop_text_that_spans_tokens(exact):
    model, tokenizer = exact
    whole = generate(model, tokenizer, PROMPTS, Sampling(24))
    stop = re.search(r"[!-~]{3}", whole[0].text[2:])[0], "never said"
    answers = generate(model, tokenizer, PROMPTS, Sampling(24, stop=stop))
    for answer, before in zip(answers, whole, strict=True):
        at = before.text.find(stop[0])
        if at < 0:
            assert answer == before
        else:
            assert answer.text == before.text[:at].strip() and answer.finish_reason == "stop"
            assert answer.tokens <= before.tokens
    assert answers[0].text == whole[0].text[: whole[0].text.find(stop[0])].strip()


def test_an_answer_at_the_limit_is_marked_cut(tiny):
    answer = generate(*tiny, ["Name three"], Sampling(1))[0]
    assert (answer.tokens, answer.finish_reason) == (1, "length")


def test_for_measuring_speed_every_answer_runs_to_the_limit(tiny, monkeypatch):
    eos = tiny[1].eos_token_id
    monkeypatch.setattr("distill_app.generation.batch.choose", lambda logits, *_: [eos] * len(logits))
    assert generate(*tiny, ["a"], Sampling(5))[0].tokens == 1
    assert generate(*tiny, ["a"], Sampling(5, stop_at_eos=False))[0].tokens == 5


def test_no_prompts_give_no_answers(tiny):
    assert generate(*tiny, [], Sampling(4)) == []


def test_a_student_is_asked_in_the_words_of_format_prompt(tiny, monkeypatch):
    asked = []

    def fake(model, tokenizer, prompts, sampling):
        asked.extend(prompts)
        return [Answer("Fine.", 2, "stop")]

    monkeypatch.setattr("distill_app.generation.infer.generate", fake)
    assert infer_student(*tiny, "How are you?", mode="system2", max_new_tokens=7) == "Fine."
    assert asked == [format_prompt("How are you?", mode="system2")]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_name_their_prompt_and_store_no_answer(tiny, tmp_path, temperature):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    (bad,) = tokenizer("ü", add_special_tokens=False)["input_ids"][:1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    sampling = {"max_new_tokens": 4, "temperature": temperature, "store": tmp_path / "store"}
    message = r"prompt '.*über word.*': found logits that are NaN or infinite, expected numbers; check the"
    with pytest.raises(EngineGone, match=message) as caught:
        label_with_teacher(model, tokenizer, [{"instruction": "an über word"}], **sampling)
    assert "\n" not in str(caught.value)
    with AnswerStore(tmp_path / "store") as store:
        assert sum(summary.answers for summary in store.summaries()) == 0

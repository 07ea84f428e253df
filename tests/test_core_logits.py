import dataclasses
import pickle
import random

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_tiny_model

from distill_app.core import logits
from distill_app.core.logits import (
    STEP,
    TAIL_FLOOR,
    About,
    TopLogits,
    TopRow,
    join_top_logits,
    new_top_logits,
    tokenizer_digest,
)
from distill_app.core.models import load_tokenizer

TOP = 3
ABOUT = About(TOP, 99, "abc", "org/teacher")


def some_rows(count: int, seed: int = 0, top: int = TOP, vocab_size: int = 99) -> list[TopRow]:
    """Rows of 0 to 9 tokens, such as no teacher gives but each told from all the others."""
    draw = np.random.default_rng(seed)
    rows = []
    for n in draw.integers(0, 10, count):
        tokens, ids = draw.integers(0, vocab_size, n), draw.integers(0, vocab_size, (n, top))
        logprobs, tail = -np.sort(draw.exponential(4, (n, top))), -draw.exponential(4, n)
        rows.append(TopRow(tokens.astype("i4"), ids.astype("i4"), logprobs.astype("f4"), tail.astype("f4")))
    return rows


def write(path, rows: list[TopRow], about: About = ABOUT) -> TopLogits:
    with new_top_logits(path, about) as add:
        for row in rows:
            add(row)
    return TopLogits(path)


def assert_equal(found: TopRow, expected: TopRow) -> None:
    """Tokens are the same; log-probabilities are within half a step, or at the floor."""
    for name in ("tokens", "ids", "logprobs", "tail"):
        one, two = getattr(found, name), getattr(expected, name)
        assert one.dtype == (np.int32 if name in ("tokens", "ids") else np.float32)
        assert one.shape == two.shape
        if one.dtype == np.int32:
            np.testing.assert_array_equal(one, two)
        else:
            np.testing.assert_allclose(one, np.maximum(two, TAIL_FLOOR), rtol=0, atol=STEP / 2 + 1e-6)


@pytest.mark.parametrize("vocab_size", [2, 388, 32000, 65536, 65537, 151_936, 262_144])
@pytest.mark.parametrize("top", [1, 3, 64])
def test_any_vocabulary_and_any_number_of_likeliest_tokens_come_back(tmp_path, vocab_size, top):
    rows = some_rows(12, seed=top, top=top, vocab_size=vocab_size)
    edges = np.array([0, vocab_size - 1], np.int32)
    flat = np.zeros((2, top), np.float32)
    rows.append(TopRow(edges, np.repeat(edges[:, None], top, 1), flat, edges * 0 - np.float32(1e9)))
    found = write(tmp_path / "x.arrow", rows, About(top, vocab_size, "abc", "org/teacher"))
    for row, expected in zip(found, rows, strict=True):
        assert_equal(row, expected)
    assert found[12].tail.tolist() == [TAIL_FLOOR, TAIL_FLOOR]


def teacher_rows(tokens: int, vocab_size: int, top: int, peak: float) -> tuple[np.ndarray, TopRow]:
    """Return whole distributions in float64, `(tokens, vocab_size)`, and the row of their likeliest tokens."""
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((tokens, vocab_size)) * peak
    logs = scores - np.logaddexp.reduce(scores, 1, keepdims=True)
    ids = np.argsort(-logs, 1)[:, :top]
    likeliest = np.take_along_axis(logs, ids, 1)
    tail = np.log1p(-np.minimum(np.exp(likeliest).sum(1), 1 - 1e-14))
    return logs, TopRow(ids[:, 0].astype("i4"), ids.astype("i4"), likeliest, tail)


@pytest.mark.parametrize("peak", [0.5, 2.0, 6.0])
def test_the_stored_distribution_diverges_from_the_teachers_by_no_more_than_is_promised(tmp_path, peak):
    _, row = teacher_rows(300, 2000, 32, peak)
    found = write(tmp_path / "x.arrow", [row], About(32, 2000, "", ""))[0]
    given, stored = (
        np.concatenate([r.logprobs, r.tail[:, None]], 1).astype(np.float64) for r in (row, found)
    )
    given -= np.logaddexp.reduce(given, 1, keepdims=True)
    stored -= np.logaddexp.reduce(stored, 1, keepdims=True)
    divergence = (np.exp(given) * (given - stored)).sum(1)
    assert (divergence <= STEP**2 / 8 + 1e-12).all()
    assert divergence.max() > STEP**2 / 1000  # the bound is not met by chance


def test_a_confident_teachers_token_takes_well_under_100_bytes(tmp_path):
    """Of 32 likeliest out of Qwen's vocabulary, whose ids alone are 68 bytes; a format before took 199."""
    draw = np.random.default_rng(0)
    n = 2000
    gaps = np.concatenate([draw.exponential(0.2, (n, 1)), draw.exponential(4, (n, 1))], 1)
    gaps = np.concatenate([gaps, draw.exponential(0.15, (n, 30))], 1)
    ids = draw.integers(0, 151_665, (n, 32)).astype("i4")
    row = TopRow(ids[:, 0], ids, -gaps.cumsum(1), -draw.exponential(4, n))
    found = write(tmp_path / "x.arrow", [row] * 5, About(32, 151_665, "", ""))
    assert found.path.stat().st_size / (5 * n) < 95


@pytest.mark.parametrize("batch_bytes", [1, 200, 2**22])
def test_rows_come_back_in_order_from_however_many_batches(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(logits, "BATCH_BYTES", batch_bytes)
    rows = some_rows(50)
    found = write(tmp_path / "new" / "x.arrow", rows)
    batches = len(found.batches)
    assert batches == {1: 50 - sum(len(r.tokens) == 0 for r in rows)}.get(batch_bytes, batches)
    assert (batches > 5) == (batch_bytes < 1000)
    assert len(found) == 50
    for row, expected in zip(found, rows, strict=True):
        assert_equal(row, expected)
    order = random.Random(1).sample(range(50), 50)
    for number in order:
        assert_equal(found[number], rows[number])


def test_the_file_says_what_it_is_of(tmp_path):
    found = write(tmp_path / "x.arrow", some_rows(2))
    assert (found.top, found.vocab_size, found.tokenizer, found.teacher) == (TOP, 99, "abc", "org/teacher")
    assert found.about == ABOUT
    assert pa.ipc.open_file(found.path).schema.metadata[b"format"] == b"distill-top-logits 2"


def test_a_file_without_rows_is_a_file(tmp_path):
    found = write(tmp_path / "x.arrow", [], About(0, 0, "", ""))
    assert (len(found), found.top, list(found)) == (0, 0, [])


def test_the_same_rows_give_the_same_bytes_in_any_place(tmp_path):
    files = [write(tmp_path / place / "x.arrow", some_rows(20)).path.read_bytes() for place in ("a", "b")]
    assert files[0] == files[1]
    assert files[0] != write(tmp_path / "c", some_rows(20, seed=1)).path.read_bytes()


def test_batches_are_on_the_disk_before_the_last_row_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "BATCH_BYTES", 2**16)
    row = TopRow(*(np.zeros(s, d) for s, d in zip((100, (100, 3), (100, 3), 100), "iiff", strict=True)))
    with new_top_logits(tmp_path / "x.arrow", ABOUT) as add:
        for _ in range(2000):
            add(row)
        (part,) = tmp_path.iterdir()
        assert part.name.endswith(".part") and part.stat().st_size > 2**20
    assert [p.name for p in tmp_path.iterdir()] == ["x.arrow"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.arrow"
    before = write(path, some_rows(3)).path.read_bytes()
    with pytest.raises(KeyError, match="stop"), new_top_logits(path, ABOUT) as add:
        add(some_rows(1)[0])
        raise KeyError("stop")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_rows_may_change_after_they_were_added(tmp_path):
    (row,) = some_rows(1)
    changed = dataclasses.replace(row, tokens=row.tokens.copy())
    with new_top_logits(tmp_path / "x", ABOUT) as add:
        add(changed)
        changed.tokens[:] += 1
    assert_equal(TopLogits(tmp_path / "x")[0], row)


def test_the_file_is_mapped_and_not_read(tmp_path):
    held = pa.total_allocated_bytes()
    found = write(tmp_path / "x.arrow", some_rows(200))
    rows = list(found)
    assert len(rows) == 200 and pa.total_allocated_bytes() == held


def test_files_are_joined_in_order(tmp_path):
    rows = some_rows(30)
    parts = [tmp_path / f"{n}.arrow" for n in range(3)]
    for n, part in enumerate(parts):
        write(part, rows[10 * n : 10 * n + 10])
    join_top_logits(tmp_path / "all.arrow", ABOUT, parts)
    found = TopLogits(tmp_path / "all.arrow")
    assert len(found) == 30 and found.about == ABOUT
    for row, expected in zip(found, rows, strict=True):
        assert_equal(row, expected)


def test_it_pickles_as_its_path(tmp_path):
    found = write(tmp_path / "x.arrow", some_rows(9))
    content = pickle.dumps(found)
    assert len(content) < 300
    again = pickle.loads(content)
    assert_equal(again[7], found[7])


def test_a_row_beyond_the_last_is_told(tmp_path):
    found = write(tmp_path / "x.arrow", some_rows(2))
    for number in (2, -1):
        with pytest.raises(IndexError, match=rf"x\.arrow: found row {number}, expected 0 to 1"):
            found[number]


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"x\.arrow: no such file; run the stage that writes it, with top"
    ):
        TopLogits(tmp_path / "x.arrow")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99, 0.9999])
def test_a_file_that_is_cut_off_is_told(tmp_path, keep):
    content = write(tmp_path / "x.arrow", some_rows(500)).path.read_bytes()
    (tmp_path / "x.arrow").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(
        ValueError, match=r'found an Arrow file that is cut off, expected "distill.*again'
    ) as e:
        TopLogits(tmp_path / "x.arrow")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"[]\n", b"x" * 5000])
def test_a_file_that_is_not_arrow_is_told(tmp_path, content):
    (tmp_path / "x.arrow").write_bytes(content)
    with pytest.raises(ValueError, match=r'found no Arrow file, expected "distill-top-logits 2"; run the'):
        TopLogits(tmp_path / "x.arrow")


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (pa.schema([("a", pa.int32())]), 'format "none"'),
        (logits.SCHEMA.with_metadata({"format": "distill-top-logits 1"}), 'format "distill-top-logits 1"'),
        (
            pa.schema([("a", pa.int32())], {"format": logits.FORMAT}),
            'format "distill-top-logits 2" with the columns a',
        ),
    ],
)
def test_another_format_is_told(tmp_path, schema, found):
    pa.ipc.new_file(tmp_path / "x.arrow", schema).close()
    with pytest.raises(ValueError, match=rf'found {found}, expected "distill-top-logits 2"; run the stage'):
        TopLogits(tmp_path / "x.arrow")


def test_a_tokenizer_is_known_by_its_tokens_and_their_ids(tiny_model_dir, tmp_path):
    digest = tokenizer_digest(load_tokenizer(str(tiny_model_dir)))
    other = load_tokenizer(str(make_tiny_model(tmp_path / "other", layers=1, seed=3)))
    assert tokenizer_digest(other) == digest
    other.chat_template = None
    assert tokenizer_digest(other) == digest
    other.eos_token, other.pad_token = "<pad>", "</s>"
    assert tokenizer_digest(other) == digest
    size = len(other)
    other.add_tokens(["<more>"])
    assert tokenizer_digest(other) != digest
    assert tokenizer_digest(other, size) == digest != tokenizer_digest(other, size - 1)

import pickle
import random

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_tiny_model

from distill_app.core import logits
from distill_app.core.logits import TopLogits, TopRow, new_top_logits, tokenizer_digest
from distill_app.core.models import load_tokenizer

TOP = 3


def some_rows(count: int, seed: int = 0) -> list[TopRow]:
    """Rows of 0 to 9 tokens, such as no teacher gives but each told from all the others."""
    draw = np.random.default_rng(seed)
    rows = []
    for n in draw.integers(0, 10, count):
        tokens, ids = draw.integers(0, 99, n), draw.integers(0, 99, (n, TOP))
        logprobs, tail = -draw.random((n, TOP)), -draw.random(n)
        rows.append(TopRow(tokens.astype("i4"), ids.astype("i4"), logprobs.astype("f2"), tail.astype("f2")))
    return rows


def write(path, rows: list[TopRow], top: int = TOP) -> TopLogits:
    with new_top_logits(path, top, 99, "abc", "org/teacher") as add:
        for row in rows:
            add(row.tokens, row.ids, row.logprobs, row.tail)
    return TopLogits(path)


def assert_equal(found: TopRow, expected: TopRow) -> None:
    for name, dtype in logits.COLUMNS.items():
        one, two = getattr(found, name), getattr(expected, name)
        assert one.dtype == dtype and one.shape == two.shape
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("batch_bytes", [1, 500, 2**22])
def test_rows_come_back_in_order_from_however_many_batches(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(logits, "BATCH_BYTES", batch_bytes)
    rows = some_rows(50)
    found = write(tmp_path / "new" / "x.arrow", rows)
    batches = pa.ipc.open_file(pa.memory_map(str(found.path))).num_record_batches
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
    assert pa.ipc.open_file(found.path).schema.metadata[b"format"] == b"distill-top-logits 1"


def test_a_file_without_rows_is_a_file(tmp_path):
    found = write(tmp_path / "x.arrow", [], top=0)
    assert (len(found), found.top, list(found)) == (0, 0, [])


def test_the_same_rows_give_the_same_bytes_in_any_place(tmp_path):
    files = [write(tmp_path / place / "x.arrow", some_rows(20)).path.read_bytes() for place in ("a", "b")]
    assert files[0] == files[1]
    assert files[0] != write(tmp_path / "c", some_rows(20, seed=1)).path.read_bytes()


def test_batches_are_on_the_disk_before_the_last_row_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "BATCH_BYTES", 2**16)
    row = TopRow(*(np.zeros(s, d) for s, d in zip((100, (100, 3), (100, 3), 100), "iiee", strict=True)))
    with new_top_logits(tmp_path / "x.arrow", TOP, 99, "", "") as add:
        for _ in range(1000):
            add(row.tokens, row.ids, row.logprobs, row.tail)
        (part,) = tmp_path.iterdir()
        assert part.name.endswith(".part") and part.stat().st_size > 2**20
    assert [p.name for p in tmp_path.iterdir()] == ["x.arrow"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.arrow"
    before = write(path, some_rows(3)).path.read_bytes()
    with pytest.raises(KeyError, match="stop"), new_top_logits(path, TOP, 99, "", "") as add:
        row = some_rows(1)[0]
        add(row.tokens, row.ids, row.logprobs, row.tail)
        raise KeyError("stop")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_rows_may_change_after_they_were_added(tmp_path):
    (row,) = some_rows(1)
    tokens = row.tokens.copy()
    with new_top_logits(tmp_path / "x", TOP, 99, "", "") as add:
        add(tokens, row.ids, row.logprobs, row.tail)
        tokens += 1
    assert_equal(TopLogits(tmp_path / "x")[0], row)


def test_what_is_read_lies_in_the_mapped_file(tmp_path):
    found = write(tmp_path / "x.arrow", some_rows(200))
    held = pa.total_allocated_bytes()
    rows = list(found)
    assert pa.total_allocated_bytes() == held
    for name in logits.COLUMNS:
        arrays = [getattr(row, name) for row in rows if len(row.tokens)]
        assert not any(a.flags.owndata or a.flags.writeable for a in arrays)
        first, last = arrays[0].ctypes.data, arrays[-1].ctypes.data
        assert last - first == sum(a.nbytes for a in arrays[:-1])  # side by side, as they are written


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
        FileNotFoundError, match=r"x\.arrow: no such file; run the label stage with label\.top"
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
    with pytest.raises(ValueError, match=r'found no Arrow file, expected "distill-top-logits 1"; run the'):
        TopLogits(tmp_path / "x.arrow")


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (pa.schema([("a", pa.int32())]), 'format "none"'),
        (logits.SCHEMA.with_metadata({"format": "distill-top-logits 2"}), 'format "distill-top-logits 2"'),
        (
            pa.schema([("a", pa.int32())], {"format": logits.FORMAT}),
            'format "distill-top-logits 1" with the columns a',
        ),
    ],
)
def test_another_format_is_told(tmp_path, schema, found):
    pa.ipc.new_file(tmp_path / "x.arrow", schema).close()
    with pytest.raises(ValueError, match=rf'found {found}, expected "distill-top-logits 1"; run the label'):
        TopLogits(tmp_path / "x.arrow")


def test_a_tokenizer_is_known_by_its_tokens_and_their_ids(tiny_model_dir, tmp_path):
    digest = tokenizer_digest(load_tokenizer(str(tiny_model_dir)))
    other = load_tokenizer(str(make_tiny_model(tmp_path / "other", layers=1, seed=3)))
    assert tokenizer_digest(other) == digest
    other.chat_template = None
    assert tokenizer_digest(other) == digest
    other.add_tokens(["<more>"])
    assert tokenizer_digest(other) != digest

from random import Random

import numpy
import pytest
import torch

from distill_app.labeling.answers import Sampling
from distill_app.labeling.sampler import choose


def nucleus(logits, temperature, top_p):
    """Plain float64 reference: probabilities of one row after the cut."""
    scores = numpy.asarray(logits, dtype=numpy.float64) / temperature
    probs = numpy.exp(scores - scores.max())
    probs /= probs.sum()
    order = numpy.argsort(-probs, kind="stable")
    before = numpy.cumsum(probs[order]) - probs[order]
    probs[order[before > top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("vocab", [5, 1024, 3000, 8192])
def test_the_likeliest_token_is_the_first_of_the_highest(vocab):
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(1)).bfloat16()  # with ties
    assert choose(logits, [], Sampling()) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.3, 0.5)])
def test_tokens_come_as_often_as_their_probability(temperature, top_p):
    logits = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.3, 2.9])
    rows = 20_000
    drawn = choose(logits.expand(rows, -1), [Random(n) for n in range(rows)], Sampling(1, temperature, top_p))
    share = numpy.bincount(drawn, minlength=6) / rows
    expected = nucleus(logits, temperature, top_p)
    assert numpy.abs(share - expected).max() < 4 * 0.5 / rows**0.5
    assert not share[expected == 0].any()


def test_a_nucleus_wider_than_the_first_candidates_is_found_whole():
    """A flat row needs nearly all of the vocabulary, a steep one beside it one token."""
    flat, steep = torch.zeros(6000), torch.zeros(6000)
    steep[17] = 30.0
    rows = 300
    drawn = choose(
        torch.stack([flat, steep]).repeat(rows, 1),
        [Random(n) for n in range(2 * rows)],
        Sampling(1, 1.0, 0.95),
    )
    assert set(drawn[1::2]) == {17}
    assert len(set(drawn[::2])) > 250 and max(drawn[::2]) > 4096


def test_a_row_s_token_does_not_depend_on_the_rows_beside_it():
    logits = torch.randn(30, 3000, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(1, 0.8, 0.9)
    together = choose(logits, [Random(n) for n in range(30)], sampling)
    assert together == [choose(logits[n : n + 1], [Random(n)], sampling)[0] for n in range(30)]

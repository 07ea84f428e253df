from random import Random

import numpy
import pytest
import torch

from distill_app.generation.answers import Sampling
from distill_app.generation.sampler import NotFinite, choose, penalized


def drawable(logits, sampling):
    """Plain float64 reference: probabilities of one row after the cuts."""
    scores = numpy.asarray(logits, dtype=numpy.float64) / sampling.temperature
    probs = numpy.exp(scores - scores.max())
    probs /= probs.sum()
    order = numpy.argsort(-probs, kind="stable")
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
        probs /= probs.sum()
    before = numpy.cumsum(probs[order]) - probs[order]
    probs[order[before > sampling.top_p]] = 0
    probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("vocab", [5, 1024, 3000, 8192])
def test_the_likeliest_token_is_the_first_of_the_highest(vocab):
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(1)).bfloat16()  # with ties
    assert choose(logits, [], Sampling()) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, 1.0),
        Sampling(1, 0.7, 0.9),
        Sampling(1, 1.3, 0.5),
        Sampling(1, 1.0, top_k=3),
        Sampling(1, 1.0, 0.6, top_k=3),
        Sampling(1, 1.0, min_p=0.4),
        Sampling(1, 1.0, 0.95, top_k=4, min_p=0.1),
        Sampling(1, 1.0, top_k=99),
    ],
)
def test_tokens_come_as_often_as_their_probability(sampling):
    logits = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.3, 2.9])
    rows = 20_000
    drawn = choose(logits.expand(rows, -1), [Random(n) for n in range(rows)], sampling)
    share = numpy.bincount(drawn, minlength=6) / rows
    expected = drawable(logits, sampling)
    assert numpy.abs(share - expected).max() < 4 * 0.5 / rows**0.5
    assert not share[expected == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [20, 300, 5000])
def test_so_many_likeliest_tokens_are_drawn_from_in_a_large_vocabulary(top_k):
    """Also where fewer would hold the share of the whole that top_p asks for."""
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(3)) / 3
    sampling = Sampling(1, 1.0, 0.9, top_k=top_k)
    rows = 4000
    drawn = choose(logits.expand(rows, -1), [Random(n) for n in range(rows)], sampling)
    allowed = drawable(logits, sampling).nonzero()[0]
    assert set(drawn) <= set(allowed.tolist())
    least_likely = logits[allowed].argsort()[: len(allowed) // 5]
    assert set(drawn) & set(allowed[least_likely].tolist())


def test_the_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    seen = [[1, 2, 2, 49], [0, 7], [5]]
    expected = [
        RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), row[None])[0]
        for ids, row in zip(seen, logits.clone(), strict=True)
    ]
    before = logits.clone()
    assert torch.equal(penalized(logits, seen, 1.3), torch.stack(expected))
    assert torch.equal(logits, before)


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


@pytest.mark.parametrize("vocab", [5, 1024, 3000])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1, 0.8), Sampling(1, 0.8, 0.9)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_no_token(vocab, sampling, value):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(3))
    logits[4, vocab - 2] = value
    with pytest.raises(NotFinite, match="the logits of row 4 are not finite") as caught:
        choose(logits, [Random(n) for n in range(6)], sampling)
    assert caught.value.row == 4
    logits[4] = -torch.inf
    with pytest.raises(NotFinite, match="row 4"):
        choose(logits, [Random(n) for n in range(6)], sampling)
    logits[4, 3] = 0.0  # a token that alone is allowed
    assert choose(logits, [Random(n) for n in range(6)], sampling)[4] == 3

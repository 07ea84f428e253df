"""What an answer costs, timed on engines whose time is known."""

import time
from collections.abc import Iterable, Iterator

import pytest
from fakes import Echo
from test_evaluation_measure import params_of

from distill_app.evaluation.asking.cost import Timed, _working_bytes, time_answers
from distill_app.generation.answers import Answer, Sampling


class Steady(Echo):
    """Writes so many tokens, each at the cost of a look at a clock that the test winds."""

    def __init__(self, clock: list[float], read_sec: float, pace_sec: float, tokens: int) -> None:
        super().__init__()
        self.clock, self.read_sec, self.pace_sec, self.tokens = clock, read_sec, pace_sec, tokens

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        for place, _ in enumerate(prompts):
            tokens = min(self.tokens, sampling.max_new_tokens)
            self.clock[0] += self.read_sec + self.pace_sec * (tokens - 1)
            yield place, Answer("x", tokens, "stop", 3)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_reading_and_writing_are_told_apart(clock):
    timed = {
        "a": Timed(Steady(clock, 0.5, 0.1, 20), ["p"] * 4),
        "b": Timed(Steady(clock, 0.1, 0.2, 3), ["p"] * 4),
    }
    params = params_of(timed_prompts=2, load_prompts=4, timed_tokens=6, timed_rounds=3)
    found = time_answers(timed, params)
    assert found["a"]["first_sec"] == [[0.5, 0.5]] * 3
    assert found["a"]["alone_sec"] == [[pytest.approx(1.0)] * 2] * 3 and found["a"]["alone_tokens"] == [6, 6]
    assert found["b"]["alone_tokens"] == [3, 3]  # its own answers end sooner
    assert found["a"]["load_tokens"] == 24 and found["a"]["load_sec"] == [pytest.approx(4.0)] * 3


def test_whole_answers_are_timed_where_no_number_of_tokens_is_set(clock):
    params = params_of(timed_prompts=1, load_prompts=1, timed_tokens=None, max_new_tokens=50)
    found = time_answers({"a": Timed(Steady(clock, 0.5, 0.1, 30), ["p"])}, params)
    assert found["a"]["alone_tokens"] == [30]


def test_with_fewer_prompts_than_wanted_those_are_timed(clock):
    params = params_of(timed_prompts=5, load_prompts=9)
    found = time_answers({"a": Timed(Steady(clock, 0.5, 0.1, 30), ["p", "q"])}, params)["a"]
    assert [len(one) for one in found["alone_sec"]] == [2, 2] and found["load_prompts"] == 2


def test_memory_that_a_block_takes_is_seen_on_a_cpu_even_after_more_was_freed():
    import torch

    warm = torch.ones(80 * 2**20)  # 320 MB, freed before the block: the allocator keeps some of it
    del warm
    with _working_bytes() as peak:
        held = torch.ones(16 * 2**20)
        del held
    assert peak and 50 * 2**20 < peak[0] < 100 * 2**20  # 64 MB

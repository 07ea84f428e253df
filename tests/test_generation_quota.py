import pytest
from fakes import label_params
from test_generation_endpoint import GREEDY, QUESTIONS, completion, hasty, make_proxy, prompts_of  # noqa: F401

from distill_app.core.errors import EngineGone
from distill_app.generation.endpoint import Endpoint
from distill_app.generation.engines import open_engine
from distill_app.generation.quota import Meter, Quota


def test_without_limits_nothing_waits():
    meter = Meter(Quota())
    assert [meter.announce(5.0, 10**6, 10**6) for _ in range(3)] == [0, 0, 0]


def test_requests_are_spread_over_the_minute():
    meter = Meter(Quota(requests_per_minute=30))
    assert [meter.announce(100.0, 1, 1) for _ in range(3)] == [0, 2, 4]
    assert meter.announce(107.0, 1, 1) == 0


def test_tokens_a_minute_are_those_that_were_used():
    meter = Meter(Quota(tokens_per_minute=600))
    assert meter.announce(0.0, 50, 50) == 0
    assert meter.announce(0.0, 50, 50) == pytest.approx(10)
    meter.settle((50, 50), (20, 10))
    meter.settle((50, 50), (20, 10))
    assert meter.announce(0.0, 50, 50) == pytest.approx(6)


def test_a_run_never_costs_more_than_its_ceiling():
    meter = Meter(Quota(max_cost=1.0, price_in=1000.0, price_out=2000.0))
    assert meter.announce(0, 100, 100) == 0  # up to 0.30
    assert meter.announce(0, 100, 100) == 0
    meter.settle((100, 100), (100, 50))
    assert (meter.spent, meter.announced) == (pytest.approx(0.2), pytest.approx(0.3))
    meter.announce(0, 0, 200)
    with pytest.raises(
        EngineGone, match=r"label\.max_cost: found 0\.20 spent .* expected no more than 1\.00; raise"
    ):
        meter.announce(0, 0, 100)
    meter.announce(0, 0, 50)
    for announced in ((100, 100), (0, 200), (0, 50)):
        meter.settle(announced, announced)
    assert meter.spent == pytest.approx(1.0)


def test_a_hosted_run_ends_at_its_ceiling_with_the_answers_kept(make_proxy):  # noqa: F811
    """A prompt is announced at no more than 12 tokens of answer and settled at 3."""
    proxy = make_proxy(script=lambda body, n: completion())
    engine = Endpoint("m", proxy.url, 1, quota=Quota(max_cost=20.0, price_out=1e6))
    prompts, got = prompts_of(engine, [*QUESTIONS, *QUESTIONS]), []
    with pytest.raises(EngineGone, match=r"label\.max_cost: found 9\.00 spent"):
        for place, _ in engine.generate(prompts, GREEDY):
            got.append(place)
    assert got == [0, 1, 2] and len(proxy.bodies) == 3


def test_a_ceiling_without_prices_is_told():
    params = label_params(engine="openai", base_url="http://h/v1", max_cost=5.0)
    with pytest.raises(ValueError, match=r"label\.price_in, label\.price_out: found 0, expected the prices"):
        open_engine(params)
    assert open_engine(params.model_copy(update={"price_out": 1.0})).meter.quota == Quota(
        max_cost=5.0, price_out=1.0
    )

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta, binom, ttest_1samp

from distill_app.evaluation import statistics

VERDICT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/verdict.py"))


def points(both: int, better: int, worse: int, neither: int) -> statistics.Figure:
    """The figure of a table of right and wrong answers, in the order of Tango's table 15."""
    student = [1] * (both + better) + [0] * (worse + neither)
    return statistics.paired_points(student, [1] * both + [0] * better + [1] * worse + [0] * neither)


def wilson(k: int, n: int) -> tuple[float, float]:
    """The closed form, in float64 (Wilson 1927)."""
    z, p = 1.959963984540054, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@pytest.mark.parametrize(("k", "n"), [(0, 50), (2, 50), (20, 50), (50, 50), (1, 1)])
def test_a_share_has_wilsons_interval(k, n):
    found = statistics.share([True] * k + [False] * (n - k))
    low, high = wilson(k, n)
    assert found["value"] == pytest.approx(k / n)
    assert found["low"] == pytest.approx(low, abs=1e-5) and found["high"] == pytest.approx(high, abs=1e-5)


def test_a_mean_has_an_interval_near_the_normal_one():
    values = list(np.random.default_rng(0).normal(3, 1, 400))
    found = statistics.mean(values)
    half = 1.96 * np.std(values) / 20
    assert found["value"] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["low"] == pytest.approx(np.mean(values) - half, abs=0.02)
    assert found["high"] == pytest.approx(np.mean(values) + half, abs=0.02)


@pytest.mark.parametrize(
    ("table", "low", "high", "digits"),
    [
        ((36, 12, 2, 0), 0.0611, 0.3447, 4),
        ((59, 6, 16, 80), -0.1240, -0.0054, 4),
        ((1, 1, 7, 12), -0.517, -0.026, 3),
        ((7, 25, 2, 68), 0.139, 0.321, 3),
    ],
)
def test_without_the_correction_the_interval_is_the_published_one(table, low, high, digits, monkeypatch):
    corrected = points(*table)
    monkeypatch.setattr(statistics, "half_step", lambda *cells: 0.0)
    found = points(*table)
    assert (round(found["low"], digits), round(found["high"], digits)) == (low, high)
    assert corrected["low"] < found["low"] and found["high"] < corrected["high"]
    assert corrected["value"] == found["value"] == pytest.approx((table[1] - table[2]) / sum(table), abs=1e-6)


def test_the_score_is_that_of_tangos_own_example(monkeypatch):
    """Soft contact lenses, 44 pairs, Delta = 0.1: Z = 1.709, and a lower 90 % limit of -0.096."""
    monkeypatch.setattr(statistics, "half_step", lambda *cells: 0.0)
    monkeypatch.setattr(statistics, "Z", 1.7085)
    assert statistics.tango_excess(0, 1, 44, -0.1) > 0
    monkeypatch.setattr(statistics, "Z", 1.7095)
    assert statistics.tango_excess(0, 1, 44, -0.1) < 0
    monkeypatch.setattr(statistics, "Z", 1.6448536)
    assert round(points(43, 0, 1, 0)["low"], 3) == -0.096


def test_the_share_that_only_the_teacher_gets_right_is_the_likeliest_one(monkeypatch):
    """Found over a grid of the multinomial's likelihood, as the paper defines it."""
    monkeypatch.setattr(statistics, "half_step", lambda *cells: 0.0)
    better, worse, count = 4, 9, 40
    for difference in (-0.4, -0.1, 0.2):
        q = np.linspace(max(0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 400_001)
        likelihood = better * np.log(q + difference) + worse * np.log(q)
        likelihood += (count - better - worse) * np.log(1 - 2 * q - difference)
        best = q[likelihood.argmax()]
        spread = math.sqrt(count * (2 * best + difference * (1 - difference)))
        reference = better - worse - count * difference - statistics.Z * spread
        assert statistics.tango_excess(better, worse, count, difference) == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12])
def test_every_table_has_an_interval_that_mirrors_and_rises_with_the_right_answers(count):
    found = {
        (better, worse): points(count - better - worse, better, worse, 0)
        for better in range(count + 1)
        for worse in range(count + 1 - better)
    }
    for (better, worse), figure in found.items():
        assert -1 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert figure["low"] < figure["high"]
        mirrored = found[worse, better]
        assert (figure["low"], figure["high"]) == (-mirrored["high"], -mirrored["low"])
        for more in ((better + 1, worse), (better, worse - 1), (better + 1, worse - 1)):
            if more in found:
                assert found[more]["low"] >= figure["low"] and found[more]["high"] >= figure["high"]
    assert found[0, count]["low"] == -1 and found[count, 0]["high"] == 1


def test_a_teacher_in_the_students_place_is_within_ten_points_from_fifty_questions_on():
    answers = [1, 0, 1, 1, 0] * 10
    assert statistics.paired_points(answers, answers)["low"] == pytest.approx(-0.0888758)
    assert statistics.paired_points(answers[:30], answers[:30])["low"] < -0.1


@pytest.mark.parametrize("margin", [0.05, 0.1])
@pytest.mark.parametrize("count", [20, 50, 100, 200, 1000])
def test_a_student_just_below_the_margin_is_met_in_less_than_two_and_a_half_percent(count, margin):
    """Exact, at the worst share of differing answers; the published interval exceeds it."""
    published, at_margin, below = (
        max(column) for column in zip(*VERDICT["false_met"](count, margin), strict=True)
    )
    assert below < at_margin < 2.5 < published
    assert below > 1.5  # not bought with an interval that is far too wide


def test_what_is_enumerated_is_what_the_figure_says():
    better, worse = VERDICT["tables"](15)
    chances = VERDICT["probabilities"](better, worse, 15, -0.1, 0.4)
    assert chances.sum() == pytest.approx(1)
    assert (chances * (better - worse)).sum() / 15 == pytest.approx(-0.1)
    for margin in (0.1, 0.3):
        met = statistics.tango_excess(better, worse, 15, -margin) > 0
        missed = statistics.tango_excess(worse, better, 15, margin) > 0
        assert met.any() and missed.any()
        figures = [points(15 - b - w, int(b), int(w), 0) for b, w in zip(better, worse, strict=True)]
        assert [figure["low"] > -margin for figure in figures] == list(met)
        assert [figure["high"] < -margin for figure in figures] == list(missed)


@pytest.mark.parametrize(
    ("count", "differing", "difference", "met", "missed"),
    [
        (50, 0.0, 0.0, 100, 0),
        (50, 0.1, 0.0, 37.1, 0),
        (50, 0.2, 0.0, 25.9, 0),
        (50, 0.3, 0.0, 19.9, 0),
        (200, 0.1, 0.0, 98.2, 0),
        (200, 0.2, 0.0, 85.4, 0),
        (200, 0.3, 0.0, 70.3, 0),
        (1000, 0.3, 0.0, 100, 0),
        (50, 0.3, -0.2, 0, 23.7),
        (200, 0.3, -0.2, 0, 77.5),
        (1000, 0.3, -0.2, 0, 100),
    ],
)
def test_how_often_a_margin_of_ten_points_is_decided(count, differing, difference, met, missed):
    found = VERDICT["outcomes"](count, differing, difference, 0.1)
    assert found == pytest.approx((met, missed), abs=0.05)


def test_a_mean_of_zeros_and_ones_by_gaffke_is_clopper_and_pearsons():
    low, high = statistics._gaffke(np.array([1.0] * 17 + [-1.0] * 3))
    assert (low + 1) / 2 == pytest.approx(beta.ppf(0.025, 17, 4), abs=0.01)
    assert (high + 1) / 2 == pytest.approx(beta.ppf(0.975, 18, 3), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 50, 200])
def test_graded_scores_with_rare_large_losses_are_seldom_met_below_the_margin(n):
    """A t interval errs in 28, 14 and 5 % of these cases."""
    rng = np.random.default_rng(5)
    errors = naive = 0
    for _ in range(300):
        lost = np.where(rng.random(n) < 0.0625, 0.8, rng.uniform(0, 0.04, n))  # 0.069 on average
        teacher = np.full(n, 0.9)
        errors += statistics.paired_points(list(teacher - lost), list(teacher))["low"] > -0.068
        naive += ttest_1samp(-lost, -0.068, alternative="greater").pvalue < 0.025
    assert errors <= 0.025 * 300 < naive


@pytest.mark.parametrize("n", [1, 2, 50])
def test_graded_scores_that_are_all_the_same_leave_a_doubt_that_shrinks(n):
    found = statistics.paired_points([0.5] * n, [0.5] * n)
    assert found["value"] == 0 and found["low"] == pytest.approx(-(1 - 0.025 ** (1 / n)), rel=0.05)
    assert found["high"] == pytest.approx(1 - 0.025 ** (1 / n), rel=0.05)


def test_paired_points_refuse_what_is_not_paired_or_no_share():
    with pytest.raises(ValueError, match="3 scores of the student, 2 of the teacher"):
        statistics.paired_points([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="scores lie between 0 and 36; expected 0 to 1"):
        statistics.paired_points([36.0], [0.0])
    with pytest.raises(ValueError, match="expected 0 to 1"):
        statistics.paired_points([math.nan], [0.5])
    assert statistics.paired_points([], []) == {"value": None, "low": None, "high": None}


def clustered(rng: np.random.Generator, prompts: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the tokens of prompts that are unlike in length and in rate."""
    tokens = np.maximum(1, rng.lognormal(3, 0.6, prompts).round())
    if kind == "agreement":
        return rng.binomial(tokens.astype(int), rng.beta(8, 1, prompts)).astype(float), tokens
    return rng.gamma(2, 0.5, prompts) * tokens, tokens


@pytest.mark.parametrize(("kind", "truth"), [("agreement", 8 / 9), ("kl", 1.0)])
@pytest.mark.parametrize("prompts", [20, 50])
def test_the_interval_of_a_rate_holds_the_truth(prompts, kind, truth):
    rng = np.random.default_rng(prompts)
    hits = 0
    for _ in range(1000):
        sums, tokens = clustered(rng, prompts, kind)
        found = statistics.rate(sums, tokens, most=1 if kind == "agreement" else None)
        hits += found["low"] <= truth <= found["high"]
    assert 930 <= hits <= 965


def test_the_interval_of_a_rate_that_can_be_negative_ends_where_a_t_test_ends_to_tell():
    rng = np.random.default_rng(3)
    sums, tokens = clustered(rng, 30, "kl")
    sums = sums - 0.5 * tokens
    found = statistics.rate(sums, tokens)
    assert found["value"] == pytest.approx(sums.sum() / tokens.sum(), rel=1e-5)
    for end in (found["low"], found["high"]):
        assert ttest_1samp(sums - end * tokens, 0).pvalue == pytest.approx(0.05, abs=1e-4)


def test_a_rate_stays_within_what_a_rate_can_be():
    few, tokens = [0.0, 0.0, 0.0, 2.0], [5.0, 6.0, 7.0, 8.0]
    found = statistics.rate(few, tokens, most=1)
    rest = statistics.rate([n - s for n, s in zip(tokens, few, strict=True)], tokens, most=1)
    assert 0 < found["low"] < 2 / 26 < found["high"] < 1
    assert rest["low"] == pytest.approx(1 - found["high"], abs=1e-5)
    assert rest["high"] == pytest.approx(1 - found["low"], abs=1e-5)
    assert statistics.rate(few, tokens)["low"] > 0
    scaled = statistics.rate([100 * s for s in few], tokens, most=100)
    assert scaled == pytest.approx({name: 100 * number for name, number in found.items()}, rel=1e-4)


@pytest.mark.parametrize(
    ("sums", "tokens", "value"),
    [([], [], None), ([0.0], [0.0], None), ([3.0], [6.0], 0.5), ([3, 4], [3, 4], 1)],
)
def test_a_rate_without_a_spread_has_no_interval(sums, tokens, value):
    assert statistics.rate(sums, tokens) == {"value": value, "low": None, "high": None}


def test_the_share_of_a_gap_that_is_closed_is_paired():
    before, teacher = [0.0] * 20 + [1.0] * 5 + [0.0] * 5, [1.0] * 25 + [0.0] * 5
    after = [1.0] * 10 + [0.0] * 10 + [1.0] * 5 + [0.0] * 5
    found = statistics.share_closed(after, before, teacher)
    assert found["value"] == 0.5 and 0.2 < found["low"] < 0.3 and 0.75 < found["high"] < 0.85
    everything = statistics.share_closed(teacher, before, teacher)
    assert everything["value"] == 1 and 0.8 < everything["low"] < 0.9 and everything["high"] > 1
    nothing = statistics.share_closed(before, before, teacher)
    assert nothing["value"] == nothing["low"] == 0 and 0.05 < nothing["high"] < 0.2


def test_without_a_gap_there_is_no_share_of_it():
    none = {"value": None, "low": None, "high": None}
    before, teacher = [1.0] * 5 + [0.0] * 45, [0.0] * 2 + [1.0] * 6 + [0.0] * 42  # 5 and 6 right
    assert statistics.share_closed([1.0] * 50, before, teacher) == none
    assert statistics.share_closed([1.0] * 50, [1.0] * 50, [0.0] * 50) == none  # the teacher is worse
    assert statistics.share_closed([1.0] * 50, [0.5] * 50, [0.5] * 50) == none
    assert statistics.share_closed([], [], []) == none
    assert statistics.share_closed([1.0], [0.0], [1.0]) == none


def test_a_student_between_floor_and_ceiling_has_a_place_by_tokens():
    tokens = np.array([10.0, 20.0, 40.0, 30.0])
    floor, ceiling = 0.4 * tokens, 0.8 * tokens
    student = np.array([0.4, 0.6, 0.6, 0.8]) * tokens
    found = statistics.share_closed(student, floor, ceiling)
    assert found["value"] == pytest.approx((60 * 0.2 + 30 * 0.4) / (0.4 * 100))
    assert found["low"] < found["value"] < found["high"]
    negated = statistics.share_closed(student - tokens, floor - tokens, ceiling - tokens)  # -KL, say
    assert negated == pytest.approx(found)


def test_the_ceiling_in_the_students_place_is_at_one_with_a_doubt_that_shrinks():
    rng = np.random.default_rng(0)
    ends = []
    for prompts in (20, 50, 200):
        floor, ceiling = rng.uniform(3, 6, prompts), rng.uniform(7, 9, prompts)
        found = statistics.share_closed(ceiling, floor, ceiling)
        assert found["value"] == 1 < found["high"]
        ends.append(found["low"])
    assert 0.8 < ends[0] < 0.9 < ends[1] < 0.97 < ends[2] < 1


@pytest.mark.parametrize("prompts", [20, 50])
def test_the_interval_of_a_place_holds_the_truth(prompts):
    rng = np.random.default_rng(prompts)
    hits = 0
    for _ in range(1000):
        tokens, shared = rng.lognormal(3, 0.6, prompts), rng.gamma(4, 0.25, prompts)
        floor, student, ceiling = (
            -kl * tokens * shared * rng.gamma(4, 0.25, prompts) for kl in (2.0, 1.2, 0.4)
        )
        found = statistics.share_closed(student, floor, ceiling)
        hits += found["value"] is not None and found["low"] <= 0.5 <= found["high"]
    assert 940 <= hits <= 985


@pytest.mark.parametrize("n", [50, 100, 200])
def test_a_student_that_closes_just_too_little_is_seldom_thought_to_close_enough(n):
    """Of a teacher that is always right and a student that was always wrong; the chance is exact."""
    chance = 0.0
    for right in range(n + 1):
        found = statistics.share_closed([1.0] * right + [0.0] * (n - right), [0.0] * n, [1.0] * n)
        if found["low"] > 0.9:
            chance += binom.pmf(right, n, 0.9 - 0.001)
    assert chance < 0.033  # 0.108, 0.054 and 0.052 without one more question


@pytest.mark.parametrize(
    ("found", "threshold", "needed"),
    [
        ((0.0, -0.12, 0.12), -0.1, 72),
        ((0.0, -0.2, 0.2), -0.1, 200),
        ((-0.05, -0.2, 0.1), -0.1, 450),
        ((3.3, 2.8, 3.9), 3.0, 140),
        ((2.9, 2.4, 3.5), 3.0, 1800),
        ((0.0, -0.05, 0.05), -0.1, 13),
        ((-0.1, -0.2, 0.0), -0.1, None),
        ((0.0, None, 0.1), -0.1, None),
        ((None, None, None), -0.1, None),
        ((0.5, 0.5, 0.6), 0.1, 1),
    ],
)
def test_how_many_prompts_would_decide(found, threshold, needed):
    count = statistics.prompts_needed(statistics.figure(*found), threshold, 50)
    assert count == needed and (count is None or isinstance(count, int))


def test_as_many_prompts_as_are_needed_do_decide():
    few = points(20, 2, 2, 26)
    needed = statistics.prompts_needed(few, -0.1, 50)
    assert few["low"] < -0.1 and needed == 67
    many = points(20 * needed // 50, round(2 * needed / 50), round(2 * needed / 50), 26 * needed // 50)
    assert many["low"] == pytest.approx(-0.1, abs=0.006)


def timed(rng, rounds: int, prompts: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a student that is 3 times as fast: drift of both, noise of a round and of an answer."""
    drift = 0.1 * rng.normal(size=(rounds, 1))
    noise = [0.03 * (rng.normal(size=(rounds, 1)) + rng.normal(size=(rounds, prompts))) for _ in range(2)]
    lengths = rng.normal(size=(3, prompts))
    student, teacher = (spread * math.sqrt(0.5) * (lengths[0] + own) for own in lengths[1:])
    return np.exp(student + drift + noise[0]) / 3, np.exp(teacher + drift + noise[1])


@pytest.mark.parametrize(
    ("rounds", "prompts", "spread"), [(2, 20, 0.5), (3, 20, 0.5), (2, 200, 0.1), (3, 200, 0.1)]
)
def test_the_interval_of_a_speed_holds_the_noise_of_its_rounds(rounds, prompts, spread):
    rng = np.random.default_rng(8)
    hits = alone = 0
    for _ in range(200):
        student, teacher = timed(rng, rounds, prompts, spread)
        found = statistics.speed_ratio(student, teacher)
        hits += found["low"] <= 3 <= found["high"]
        found = statistics.rate(teacher.mean(axis=0), student.mean(axis=0))
        alone += found["low"] <= 3 <= found["high"]
    assert hits >= 0.93 * 200
    assert alone < (hits if spread == 0.5 else 0.6 * 200)  # the prompts alone know nothing of the rounds


def test_what_slows_a_whole_round_changes_no_speed():
    rng = np.random.default_rng(2)
    student, teacher = timed(rng, 3, 20, 0.5)
    found = statistics.speed_ratio(student, teacher)
    assert found["value"] == pytest.approx(teacher.sum() / student.sum(), rel=1e-5)
    steady = rng.uniform(1, 2, (1, 20)) * np.ones((3, 1))
    slowed = np.array([[1.0], [1.5], [0.7]])
    assert statistics.speed_ratio(steady, 3 * steady) == {"value": 3, "low": 3, "high": 3}
    once = statistics.speed_ratio(steady, 3 * steady[:, ::-1])
    again = statistics.speed_ratio(slowed * steady, 3 * slowed * steady[:, ::-1])
    assert again["value"] == once["value"] and again["low"] == pytest.approx(once["low"], rel=0.05)


def test_one_round_tells_no_noise():
    assert statistics.speed_ratio([[1.0, 2.0]], [[2.0, 4.1]]) == {"value": 2.03333, "low": None, "high": None}
    assert statistics.speed_ratio([[1.0], [2.0]], [[2.0], [4.0]])["low"] is None
    assert statistics.speed_ratio([[0.0], [0.0]], [[2.0], [4.0]])["value"] is None
    with pytest.raises(ValueError, match=r"seconds of shape \(1, 2\) and \(2, 1\); expected"):
        statistics.speed_ratio([[1.0, 2.0]], [[1.0], [2.0]])


def test_figures_can_be_written_as_json():
    rng = np.random.default_rng(4)
    first, second, third = rng.uniform(0.1, 1, (3, 20))
    for found in (
        statistics.paired_points(first, second),
        statistics.paired_points(first > 0.5, second > 0.5),
        statistics.rate(first, second),
        statistics.share_closed(first, second - 1, third),
        statistics.speed_ratio([first, second], [second, third]),
    ):
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["low"] < found["value"] < found["high"]

"""The report's pictures: what they draw, in colours that are seen on both grounds."""

import itertools
import re
from pathlib import Path

import pytest

from distill_app.comparison import charts
from distill_app.comparison.charts import COLOURS, Bar, bar_chart, goal_chart, loss_chart

PAGE = Path(charts.__file__).with_name("report.html.jinja")
UNBOUNDED = {"value": 10.0, "low": 4.0, "high": None}


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    "svg",
    [
        bar_chart([Bar("Teacher", 0.5, "50%", (0.4, 0.6)), Bar("System 1", None, "–")]),
        bar_chart([Bar("Teacher", 5.0, "500%", (4.0, None)), Bar("System 1", float("nan"), "–")]),
        loss_chart(
            {"train": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1}]},
            "#2f7fd0",
        ),
        goal_chart({"value": 0.2, "low": 0.1, "high": 0.3}, 0.9, "wanted 90%", "#2f7fd0"),
        goal_chart(UNBOUNDED, 0.9, "wanted 90%", "#2f7fd0"),
        goal_chart(dict.fromkeys(UNBOUNDED), 0.9, "wanted 90%", "#2f7fd0"),
    ],
    ids=["bars", "no bound above", "loss", "goal", "goal, no bound above", "goal, nothing known"],
)
def test_a_chart_takes_the_pages_colour_and_has_no_ground(svg):
    texts = re.findall(r"<text[^>]*>", svg)
    assert texts and all('fill="currentColor"' in text for text in texts)
    # A ground would be a filled shape of the whole picture: only the marks are filled.
    filled = re.findall(r'fill="(?!none|currentColor|transparent)([^"]+)"', svg)
    assert set(filled) <= {"#7b8490", "#2f7fd0"}
    assert "NaN" not in svg


def test_a_bar_is_as_long_as_its_value_says():
    svg = bar_chart([Bar("Teacher", 10.0, "10"), Bar("System 1", 5.0, "05")])
    lengths = [float(n) for n in re.findall(r'd="M0,[\d.]+h([\d.]+)v[^"]*"[^>]*fill="#', svg)]
    assert len(lengths) == 2
    assert lengths[0] == pytest.approx(2 * lengths[1])


def test_a_bar_of_what_was_before_is_hollow():
    svg = bar_chart([Bar("System 1 before", 5.0, "5"), Bar("System 1", 5.0, "5")])
    before, after = re.findall(r'<path[^>]*fill="#2f7fd0"[^>]*>', svg)
    assert 'fill-opacity="0.15"' in before and 'stroke="#2f7fd0"' in before
    assert 'fill-opacity="0.15"' not in after


def test_a_goal_is_drawn_where_its_figure_and_interval_are():
    svg = goal_chart({"value": 0.2, "low": 0.1, "high": 0.4}, 0.8, "wanted 80%", "#2f7fd0")
    (low, high) = re.findall(
        r'transform="translate\(([\d.]+),26\)" x2="([\d.-]+)"[^>]*stroke="#2f7fd0"', svg
    )[0]
    (value,) = re.findall(r'transform="translate\(([\d.]+),26\)"[^>]*fill="#2f7fd0"', svg)
    (wanted,) = re.findall(r'transform="translate\(([\d.]+),16\)"', svg)
    left, right = sorted((float(low), float(low) + float(high)))
    assert float(value) / float(wanted) == pytest.approx(0.2 / 0.8)
    assert (left / float(wanted), right / float(wanted)) == pytest.approx((0.1 / 0.8, 0.4 / 0.8))
    assert "wanted 80%" in svg


def test_an_interval_without_a_bound_above_goes_on_to_the_end_of_the_line():
    svg = goal_chart(UNBOUNDED, 0.9, "wanted 90%", "#2f7fd0")
    line, spread = re.findall(r'transform="translate\(([\d.]+),26\)" x2="([\d.-]+)"', svg)
    assert sum(map(float, line)) == pytest.approx(sum(map(float, spread)))


def test_a_goal_without_a_figure_shows_the_goal_alone():
    svg = goal_chart(dict.fromkeys(UNBOUNDED), 0.9, "wanted 90%", "#2f7fd0")
    assert "wanted 90%" in svg and "#2f7fd0" not in svg


@pytest.mark.parametrize("colour", sorted(set(COLOURS.values())))
def test_every_colour_stands_out_from_every_ground_of_the_page(colour):
    grounds = re.findall("--(?:page|card): (#[0-9a-f]{6})", PAGE.read_text(encoding="utf-8"))
    assert len(grounds) == 4
    for ground in grounds:
        light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11


def test_the_systems_differ_in_more_than_red_and_green():
    # What red-green blindness leaves of a colour is, roughly, its blue beside its yellow.
    hues = {tuple(int(c[place : place + 2], 16) for place in (1, 3, 5)) for c in COLOURS.values()}
    yellowness = [(red + green) / 2 - blue for red, green, blue in hues]
    assert all(abs(one - other) > 60 for one, other in itertools.combinations(yellowness, 2))

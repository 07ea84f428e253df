"""Charts of the report, as SVG text that takes the page's colours and needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple
from xml.sax.saxutils import escape

from distill_app.evaluation.measures import is_known

if TYPE_CHECKING:
    import altair as alt

# A hue a system, between 3:1 and 6:1 against the page's white and its near-black, so that one set serves both
# schemes; blue and orange stay apart for every common colour blindness.
COLOURS = {"system1": "#2f7fd0", "system2": "#c77700"}
INK = "currentColor"
# Labels of a scale are kept apart for its width on a phone; on a wider one they only part further.
SCALE_WIDTH = 250  # pixels
SCALE_HEIGHT = 46
LINE_AT = 23  # pixels from the top: the student and the target are named above it, all else below
MARGIN = 0.03  # of the width, beyond the outermost marks
CHARACTER_WIDTH = 6.8  # pixels at font size 12: generous, for the reader's font is not known here
LABEL_GAP = 10  # pixels between two labels


class Point(NamedTuple):
    """One point of a scale: what stands there, how it is named, and where it is, with its interval."""

    role: Literal["floor", "before", "student", "ceiling", "target"]
    name: str
    value: float
    text: str  # the value as people read it
    interval: tuple[float | None, float | None] = (None, None)


def scale_chart(points: Sequence[Point], colour: str, from_zero: bool = False, falls: bool = False) -> str:
    """Return an SVG of points on a line, each with its name and figure; as wide as there is room.

    The student is a filled point with its interval, the student before a hollow one, floor and ceiling are
    short strokes, the target a long dashed one. An interval without a bound above goes on to the line's end.

    Args:
        from_zero: whether the line begins at zero, else at the least of what it shows.
        falls: whether less is better; then the scale runs from right to left, so that better is right.
    """
    ends = [end for point in points for end in (point.value, *point.interval)]
    known = [end for end in ends if end is not None and is_known(end)]
    low, high = 0.0 if from_zero else min(known, default=0.0), max(known, default=1.0)

    def at(value: float) -> float:
        share = (value - low) / ((high - low) or 1.0)
        return 100 * (MARGIN + (1 - 2 * MARGIN) * (1 - share if falls else share))

    drawn = [_line(0, 100, f'stroke="{INK}" stroke-opacity="0.3" stroke-width="2"')]
    drawn += [_mark(point, at, high, colour) for point in sorted(points, key=_depth)]
    for above in (True, False):
        lane = [point for point in points if (point.role in ("student", "target")) is above]
        drawn += _labels(
            sorted(lane, key=lambda point: at(point.value)), at, LINE_AT + (-12 if above else 20)
        )
    size = f'width="100%" height="{SCALE_HEIGHT}" font-size="12"'
    return f'<svg class="scale" xmlns="http://www.w3.org/2000/svg" {size}>{"".join(drawn)}</svg>'


def _depth(point: Point) -> int:
    """Return the place of a mark from the back to the front: nothing hides the student."""
    return ("floor", "ceiling", "target", "before", "student").index(point.role)


def _mark(point: Point, at: Callable[[float], float], end: float, colour: str) -> str:
    x = at(point.value)
    if point.role == "student":
        dot = f'<circle cx="{x:.2f}%" cy="{LINE_AT}" r="5.5" fill="{colour}"/>'
        first, last = point.interval
        if first is None or not is_known(first):
            return dot
        ends = at(first), at(last if last is not None and is_known(last) else end)
        return _line(*ends, f'stroke="{colour}" stroke-opacity="0.45" stroke-width="9"') + dot
    if point.role == "before":
        ring = f'r="4.5" fill="none" stroke="{colour}" stroke-width="2"'
        return f'<circle cx="{x:.2f}%" cy="{LINE_AT}" {ring}/>'
    is_target = point.role == "target"
    tall, look = (10, 'stroke-width="2" stroke-dasharray="3 2"') if is_target else (7, 'stroke-width="3"')
    style = f'stroke="{INK}" {look}'
    return f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{LINE_AT - tall}" y2="{LINE_AT + tall}" {style}/>'


def _line(first: float, last: float, style: str) -> str:
    return f'<line x1="{first:.2f}%" x2="{last:.2f}%" y1="{LINE_AT}" y2="{LINE_AT}" {style}/>'


def _labels(points: Sequence[Point], at: Callable[[float], float], y: float) -> Iterator[str]:
    """Yield a point's name and figure, from left to right: at its mark, or as near as others let it."""
    halves = [CHARACTER_WIDTH * (len(point.name) + 1 + len(point.text)) / 2 for point in points]
    centres: list[float] = []
    edge = -float(LABEL_GAP)
    for point, half in zip(points, halves, strict=True):
        centres.append(max(at(point.value) * SCALE_WIDTH / 100, edge + LABEL_GAP + half))
        edge = centres[-1] + half
    edge = SCALE_WIDTH + LABEL_GAP
    for place in reversed(range(len(points))):
        centres[place] = min(centres[place], edge - LABEL_GAP - halves[place])
        edge = centres[place] - halves[place]
    for point, centre in zip(points, centres, strict=True):
        x = at(point.value)
        # Where it had to give way, it does so by pixels, which do not grow with the picture.
        moved = centre - x * SCALE_WIDTH / 100
        name, text = escape(point.name), escape(point.text)
        yield (
            f'<text x="{x:.2f}%" dx="{moved:.1f}" y="{y}" text-anchor="middle" fill="{INK}">'
            f'{name} <tspan font-weight="600">{text}</tspan></text>'
        )


def loss_chart(curves: Mapping[str, Sequence[Mapping[str, float]]], colour: str) -> str:
    """Return an SVG of the loss over the optimizer steps: training as a line, held-out as marked points.

    Args:
        curves: points of step and loss, under "train" and "validation"; those without a loss are left out.
    """
    import altair as alt

    rows = [
        {"step": point["step"], "loss": point["loss"], "of": name}
        for name, points in curves.items()
        for point in known_points(points)
    ]
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5, grid=False, format="d"))
    y = alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    training = base.transform_filter("datum.of == 'train'").mark_line(color=colour, strokeWidth=2)
    held_out = base.transform_filter("datum.of == 'validation'").mark_line(
        color=INK, strokeWidth=1.5, strokeDash=[4, 3], point={"color": INK, "size": 40}
    )
    return _svg((training + held_out).properties(width=380, height=190))


def known_points(points: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the points that have a loss which can be drawn."""
    return [point for point in points if is_known(point.get("loss"))]


def _svg(chart: alt.LayerChart) -> str:
    import altair as alt
    import vl_convert

    # Vega's own labels for each mark are switched off: the page names the chart as a whole.
    styled = (
        chart.configure(background="transparent", aria=False, font="system-ui, sans-serif", padding=2)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK,
            titleColor=INK,
            titleFontWeight="normal",
            labelFontSize=13,
            titleFontSize=13,
            gridColor=INK,
            gridOpacity=0.15,
            domainColor=INK,
            domainOpacity=0.4,
            tickColor=INK,
            tickOpacity=0.4,
        )
    )
    # "v6.4.1" of the schema is "6.4" to the converter, which holds the renderer itself.
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return str(vl_convert.vegalite_to_svg(styled.to_dict(), vl_version=version))

"""`distill plan`: what a run will take, before anything runs."""

import argparse
from typing import TYPE_CHECKING

from distill_app.planning.hardware import GPUS, this_cpu

if TYPE_CHECKING:
    from distill_app.planning.plan import Plan, StagePlan

HELP = "show what every stage will read, take and cost, before anything runs"
HEADINGS = ("stage", "read", "written", "trained on", "memory", "disk", "Hub", "time", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "--gpu",
        choices=(*GPUS, "cpu"),
        default="cpu",
        help="on which the run is planned; cpu (default) measures this machine for a second",
    )
    parser.add_argument("--price", metavar="MONEY", type=float, default=0.0, help="of an hour of that device")
    parser.add_argument("--params", metavar="FILE", default="params.yaml", help="in place of params.yaml")


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from distill_app.planning.plan import plan_run
    from distill_app.profiles import read_sections

    if args.price < 0:
        raise ValueError(f"--price: found {args.price:g}, expected the price of an hour, 0 or more")
    plan = plan_run(read_sections(args.params), GPUS.get(args.gpu) or this_cpu())
    _print(plan, args.price)


def _print(plan: "Plan", price: float) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    device, console = plan.device, Console()
    console.print(
        f"{device.name}: {device.memory / 1e9:.0f} GB, {device.flops / 1e12:.2f} TFLOP/s of which"
        f" {device.flops_share:.0%} are reached, {device.bandwidth / 1e9:.0f} GB/s of which"
        f" {device.bandwidth_share:.0%}",
        highlight=False,
    )
    rows = [[stage.stage, *_cells(stage, price)] for stage in plan.stages]
    rows.append(["all" if plan.is_whole else "all, but for ?", "", "", "", "", *_sums(plan, price)])
    shown = [column for column in range(len(HEADINGS)) if any(row[column] not in ("", "?") for row in rows)]
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(HEADINGS[column], justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[column]) for column in shown))
    console.print(table)
    for line in _remarks(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(stage: "StagePlan", price: float) -> list[str]:
    if stage.needs:
        return ["?"] * 8
    cost = price * stage.seconds / 3600 + stage.cost
    counts = (stage.tokens_read, stage.tokens_written, stage.tokens_trained)
    return [
        *(_count(count) for count in counts),
        *(_bytes(size) for size in (stage.memory, stage.disk, stage.downloads)),
        _time(stage.seconds),
        f"{cost:.2f}" if cost else "",
    ]


def _sums(plan: "Plan", price: float) -> list[str]:
    sizes = [sum(stage.disk for stage in plan.stages), sum(stage.downloads for stage in plan.stages)]
    money = plan.money(price)
    return [*map(_bytes, sizes), _time(plan.seconds), f"{money:.2f}" if money else ""]


def _remarks(plan: "Plan") -> list[str]:
    reads = [f"reads: {stage.stage}: {', '.join(stage.reads)}" for stage in plan.stages if stage.reads]
    missing = [f"not planned: {stage.stage}: needs {stage.needs}" for stage in plan.stages if stage.needs]
    faults = [
        f"does not fit: {stage.stage}: {_bytes(stage.memory)} of {_bytes(plan.room)}; {stage.fault}"
        for stage in plan.stages
        if stage.fault
    ]
    assumed = [f"assumed: {text}" for text in plan.assumed]
    unpinned = [f"unpinned: {text} (distill pin)" for text in plan.unpinned]
    return [*reads, *assumed, *missing, *faults, *unpinned]


def _count(tokens: float) -> str:
    if not tokens:
        return ""
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.1f}k"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size else ""


def _time(seconds: float) -> str:
    minutes = round(seconds) // 60
    return (
        f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{round(seconds) % 60:02d}"
    )

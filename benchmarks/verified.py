"""Verification rounds on the default run's System 2: right answers to held-out problems, round by round.

make bench-verified

Run `dvc repro train_s2` first. Every student is asked the same held-out problems, of frames that training
knows and of new ones, and changes are paired with the trained student's answers. Minutes are of sampling and
training; each longer run trains its first rounds again, while their answers are in the store.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, get_args

from distill_app import load_student
from distill_app.core.files import Record, read_records
from distill_app.core.final_answers import is_right
from distill_app.core.params import read_section
from distill_app.core.prompts import format_prompt
from distill_app.data.overlap import overlap
from distill_app.evaluation.statistics import Figure, paired_points, share
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import generate
from distill_app.labeling.params import LabelParams
from distill_app.refining.params import RefineS2Params
from distill_app.refining.verified import VerifiedInputs, refine_by_verification

STUDENT, TRAIN, HELDOUT = "models/system2", "data/omnithought_cot.json", "data/heldout_s2.json"
MORE = "data/sample/problems/problems.parquet"


def main() -> None:
    """Refine with one round, then two and so on, and print a line of the table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    starts = get_args(RefineS2Params.model_fields["start"].annotation)
    parser.add_argument("--start", choices=starts, default="trained")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--problems", default=MORE, help="further problems; empty for none")
    args = parser.parse_args()
    heldout = read_records(HELDOUT)
    known = overlap(read_records(TRAIN), heldout).known_frame
    before = answers_right(STUDENT, heldout)
    print("| student | new frames | known frames | all | change | minutes |\n|---|---|---|---|---|---|")
    tell("trained", before, before, known, 0.0)
    for rounds in range(1, args.rounds + 1):
        started = time.monotonic()
        changed = vars(args) | {"method": "verified", "rounds": rounds, "problems": args.problems or None}
        out, metrics = refine(changed)
        minutes = (time.monotonic() - started) / 60
        tell(f"round {rounds}", answers_right(out, heldout), before, known, minutes)
        print(f"<!-- {metrics} -->", flush=True)


def refine(changed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the refined checkpoint and its metrics."""
    values = read_section("refine_s2", RefineS2Params).model_dump() | changed
    params = RefineS2Params.model_validate(values)
    inputs = VerifiedInputs(STUDENT, "configs/system2.json", TRAIN, HELDOUT)
    out = f"work/bench-verified/{params.start}-{params.rounds}"
    label = read_section("label", LabelParams)
    return out, refine_by_verification(params, label, inputs, out, f"{out}.json")


def answers_right(checkpoint: str, problems: Sequence[Record]) -> list[bool]:
    """Tell of each problem whether the student's greedy answer is right."""
    model, tokenizer = load_student(checkpoint)
    prompts = [format_prompt(p["instruction"], p["input"], "system2") for p in problems]
    said = generate(model, tokenizer, prompts, Sampling(max_new_tokens=128))
    return [bool(is_right(a.text, p["output"])) for a, p in zip(said, problems, strict=True)]


def tell(
    name: str, right: Sequence[bool], before: Sequence[bool], known: Sequence[bool], minutes: float
) -> None:
    """Print a student's line."""
    new = [ok for ok, is_known in zip(right, known, strict=True) if not is_known]
    old = [ok for ok, is_known in zip(right, known, strict=True) if is_known]
    change = paired_points([float(ok) for ok in right], [float(ok) for ok in before])
    cells = [*map(percent, (share(new), share(old), share(right))), percent(change)]
    print(f"| {name} | {' | '.join(cells)} | {minutes:.1f} |", flush=True)


def percent(figure: Figure) -> str:
    """Return a share, or a change in points, with its interval."""
    value, low, high = (100 * (figure[key] or 0.0) for key in ("value", "low", "high"))
    return f"{value:.0f} ({low:.0f}–{high:.0f})"


if __name__ == "__main__":
    main()

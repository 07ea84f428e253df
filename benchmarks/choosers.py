"""Whether choosing among several answers helps: right answers to word problems, by each chooser.

    python -m benchmarks.choosers --teacher models/base/teacher --count 40

The problems are the sample's, with their verified solutions; the reference is the ceiling of what any chooser
can reach. Greedy is the one likeliest answer without samples.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from distill_app.core.files import save_json
from distill_app.core.final_answers import is_right
from distill_app.core.params import read_section
from distill_app.generation.answers import Answer, Engine, Sampling
from distill_app.generation.engines import open_engine
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.choosing import Chooser, choose_answer
from distill_app.labeling.params import LabelParams
from distill_app.labeling.scoring import Case, open_scorer
from distill_app.labeling.store import AnswerStore

PROBLEMS = "data/sample/OmniThought/data/train-00000-of-00001.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="models/base/teacher")
    parser.add_argument("--count", type=int, default=40, help="problems")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--choosers", default="majority,likelihood,judge")
    parser.add_argument("--judge-tokens", type=int, default=48)
    parser.add_argument("--store", default="work/answers.sqlite")
    parser.add_argument("--out", help="a JSON file for the counts")
    args = parser.parse_args()
    problems = list(read_problems(args.count))
    params = read_section("label", LabelParams).model_copy(
        update={
            "teacher": args.teacher,
            "samples": args.samples,
            "store": args.store,
            "judge_max_new_tokens": args.judge_tokens,
        }
    )
    with closing(open_engine(params)) as engine, AnswerStore(args.store) as store:
        found = measure(engine, store, params, problems, args)
    for name, value in found.items():
        print(f"{name}: {value}")
    if args.out:
        save_json(Path(args.out), found)


def read_problems(count: int) -> Iterator[tuple[str, str]]:
    """Yield questions and solutions, evenly over the sample's kinds, which follow one another in it."""
    rows = pq.read_table(PROBLEMS).to_pylist()
    for row in rows[:: max(1, len(rows) // count)][:count]:
        yield row["question"], row["reasoning"][0]["solution"]


def measure(
    engine: Engine,
    store: AnswerStore,
    params: LabelParams,
    problems: list[tuple[str, str]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return how many answers are right by each way to take one."""
    prompts = [engine.render(question, "", "system1") for question, _ in problems]

    def ask(sampling: Sampling) -> list[Answer]:
        fill_store(engine, lambda: prompts, sampling, store, total=len(prompts), label="ask")
        return list(read_answers(engine, prompts, sampling, store))

    golds = [gold for _, gold in problems]
    found: dict[str, Any] = {"problems": len(problems)}
    greedy = ask(Sampling(args.max_new_tokens))
    found["greedy"] = count_right(greedy, golds)
    samples = [ask(Sampling(args.max_new_tokens, args.temperature, seed=n)) for n in range(args.samples)]
    found["each sample"] = [count_right(some, golds) for some in samples]
    cases = [
        Case(question, prompt, answers)
        for (question, _), prompt, *answers in zip(problems, prompts, *samples, strict=True)
    ]
    choosers: list[Chooser] = ["reference", *args.choosers.split(",")]
    for chooser in choosers:
        found[chooser] = chosen(engine, store, params.model_copy(update={"choose": chooser}), cases, golds)
    return found


def chosen(
    engine: Engine, store: AnswerStore, params: LabelParams, cases: list[Case], golds: list[str]
) -> dict[str, Any]:
    """Return how many of a chooser's answers are right, why it took them, and how many verdicts it read."""
    with closing(open_scorer(engine, store, params)) as scorer:
        scorer.prepare(lambda: cases, "")
        scores = list(scorer.scores(cases))
    right, why = 0, dict[str, int]()
    for case, score, gold in zip(cases, scores, golds, strict=True):
        choice = choose_answer(case.answers, gold, params.choose, score.by_place)
        why[choice.why] = why.get(choice.why, 0) + 1
        right += choice.place is not None and bool(is_right(case.answers[choice.place].text, gold))
    verdicts = {"read": sum(s.read for s in scores), "unread": sum(s.unread for s in scores)}
    return {"right": right, "why": why} | ({"verdicts": verdicts} if any(verdicts.values()) else {})


def count_right(answers: list[Answer], golds: list[str]) -> int:
    """Return how many whole answers are right."""
    return sum(
        answer.finish_reason == "stop" and bool(is_right(answer.text, gold))
        for answer, gold in zip(answers, golds, strict=True)
    )


if __name__ == "__main__":
    main()

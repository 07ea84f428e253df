"""From what the models wrote and what that cost to figures and verdicts; no model is asked."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from distill_app.core.files import Record, iter_records, read_json
from distill_app.core.final_answers import is_right
from distill_app.core.prompts import user_content
from distill_app.data.overlap import Overlap, overlap
from distill_app.evaluation.measures import BY_KEY, TASKS, Evidence, figures
from distill_app.evaluation.names import ANCHORS, MODELS, STUDENTS
from distill_app.evaluation.params import CompareParams
from distill_app.evaluation.scores import chrf, count_steps
from distill_app.evaluation.verdict import Case, judge_student

HELD_OUT = {"system1": "heldout_s1_labeled.json", "system2": "heldout_s2.json"}
TRAINED_ON = {"system1": "train_labeled.json", "system2": "omnithought_cot.json"}
FEWEST_IN_A_SLICE = 5
ABOUT = ("model", "weights", "engine", "quantization")
Rows = list[dict[str, Any]]


def compare_models(
    params: CompareParams, data_dir: str, metrics_dir: str, reports_dir: str
) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Return the comparison, as comparison.json holds it, and the answers with what each is worth.

    All is computed from answers.json, costs.json and benchmarks.json in `reports_dir`.

    Raises:
        FileNotFoundError, ValueError: an input is missing, malformed, or of another run.
    """
    reports, data = Path(reports_dir), Path(data_dir)
    answers, costs = read_json(reports / "answers.json"), read_json(reports / "costs.json")
    benchmarks = read_json(reports / "benchmarks.json")
    shared = {name: _overlap(name, data, answers) for name in STUDENTS}
    known = {"instructions": (), "reasoning": shared["system2"].known_frame}
    losses = _losses(Path(metrics_dir))
    evidence = {
        task: Evidence(task, score_rows(task, answers[task]), costs, known[task], losses) for task in TASKS
    }
    models = {name: _model(name, evidence, costs) for name in MODELS if name in costs}
    anchors = {name: _model(name, evidence, {}) for name in ANCHORS}
    comparison = {
        "prompts": {task: len(evidence[task].rows) for task in TASKS}
        | {"known": sum(known["reasoning"]), "new": len(known["reasoning"]) - sum(known["reasoning"])},
        "models": models,
        "anchors": anchors,
        "students": {},
        "overlap": {},
        "benchmarks": benchmarks,
    }
    for name, student in STUDENTS.items():
        counts = {
            "prompts": len(evidence[student.task].rows),
            "exact": shared[name].exact,
            "ngram": shared[name].ngram,
            "masked": shared[name].masked,
        }
        of_task = {who: one.get(student.task, {}) for who, one in (models | anchors).items()}
        case = Case(name, evidence[student.task], of_task, benchmarks, counts)
        targets = params.system1 if name == "system1" else params.system2
        best, worst = _best_and_worst(evidence[student.task].rows, name)
        comparison["overlap"][name] = counts
        comparison["students"][name] = judge_student(case, targets) | {
            "best": best,
            "worst": worst,
            "slices": list(_slices(case)),
        }
    rows: dict[str, Rows] = {task: [dict(row) for row in of.rows] for task, of in evidence.items()}
    for row, is_known in zip(rows["reasoning"], known["reasoning"], strict=True):
        row["known"] = is_known
    return comparison, rows


def score_rows(task: str, rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Return rows with what each answer is worth: chrF and agreement, or right and steps; and `score`, the
    student's, by which lists are sorted (0 to 1, None where there is none)."""
    scored: Rows = []
    for row in rows:
        new = {key: dict(value) if key in MODELS or key in ANCHORS else value for key, value in row.items()}
        for who in (who for who in (*MODELS, *ANCHORS) if who in new):
            answer = new[who]
            if task == "instructions":
                answer["chrf"] = chrf(answer["text"], row["reference"])
                reading = (row.get("forced") or {}).get(who)
                if reading and reading["tokens"]:
                    answer["agreed"] = reading["agreed"] / reading["tokens"]
            else:
                answer["right"] = is_right(answer["text"], row["reference"])
                answer["steps"] = count_steps(answer["text"])
        new["score"] = _score(task, new)
        scored.append(new)
    return scored


def _score(task: str, row: Mapping[str, Any]) -> float | None:
    if task == "reasoning":
        right = row["system2"]["right"]
        return None if right is None else float(right)
    answer = row["system1"]
    return answer.get("agreed", answer["chrf"] / 100)


def _model(name: str, evidence: Mapping[Any, Evidence], costs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures of a model or an anchor; a task of which it has none is left out."""
    size = Evidence("size", (), costs)
    found = {task: figures(of, name) for task, of in [*evidence.items(), ("size", size)]}
    about = {key: value for key, value in costs.get(name, {}).items() if key in ABOUT}
    return about | {group: of for group, of in found.items() if of}


def _losses(metrics: Path) -> dict[str, float]:
    """Return System 2's loss on what was held out of its training data, which no teacher here has written."""
    loss = read_json(metrics / "train_s2.json").get("validation_loss")
    return {} if loss is None else {"system2": loss}


def _overlap(name: str, data: Path, answers: Mapping[str, Rows]) -> Overlap:
    prompts = [row["prompt"] for row in answers[STUDENTS[name].task]]
    return overlap(iter_records(data / TRAINED_ON[name]), _asked(data / HELD_OUT[name], prompts))


def _asked(path: Path, prompts: Sequence[str]) -> list[Record]:
    """Return the held-out records whose prompts were asked."""
    by_prompt = {
        user_content(record["instruction"], record["input"]): record for record in iter_records(path)
    }
    if lost := [prompt for prompt in prompts if prompt not in by_prompt]:
        raise ValueError(
            f"{path}: {len(lost)} of {len(prompts)} prompts in answers.json are not in it, expected all; run"
            " measure again"
        )
    return [by_prompt[prompt] for prompt in prompts]


def _best_and_worst(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[int | None, int | None]:
    """Return the places of an answer that shows what the student can, and of one that shows what it cannot.

    Of equals the longer answer is shown: it has more to see.
    """
    scored = [
        place for place, row in enumerate(rows) if row["score"] is not None and not row[name]["refused"]
    ]
    if not scored:
        return None, None

    def rank(place: int, sign: int) -> tuple[float, int]:
        shown = rows[place][name].get("chrf", rows[place]["score"])  # of its words, which a reader sees
        return sign * shown, len(rows[place][name]["text"])

    best, worst = max(scored, key=lambda p: rank(p, 1)), max(scored, key=lambda p: rank(p, -1))
    return best, worst if worst != best else None


def _slices(case: Case) -> Iterator[dict[str, Any]]:
    """Yield the main measure by length and by kind of prompt, of slices that hold enough to be shown."""
    evidence, key = case.evidence, case.student.gain
    for by, names in _kinds(case).items():
        for name in dict.fromkeys(sorted(names)):
            places = [place for place, one in enumerate(names) if one == name]
            if not FEWEST_IN_A_SLICE <= len(places) < len(names):
                continue
            part = Evidence(evidence.group, [evidence.rows[p] for p in places], evidence.costs)
            shown = {who: BY_KEY[key].compute(part, who) for who in _shown(case)}
            yield {
                "by": by,
                "name": name,
                "prompts": len(places),
                "measure": key,
                "figures": {who: figure for who, figure in shown.items() if figure["value"] is not None},
            }


def _shown(case: Case) -> tuple[str, ...]:
    top = "teacher_as_student" if case.student.gain == "agreement" else "teacher"
    return top, case.before, case.name


def _kinds(case: Case) -> dict[str, list[str]]:
    """Return for each way to cut the prompts into kinds the kind of each."""
    rows = case.evidence.rows
    kinds = {
        "prompt length": _halves([len(row["prompt"].split()) for row in rows], "words"),
        "length of the reference": _halves([len(row["reference"].split()) for row in rows], "words"),
    }
    if case.student.task == "reasoning":
        kinds["steps of the reference"] = [_steps(row["reference"]) for row in rows]
        kinds["frame"] = ["known to training" if known else "new" for known in case.evidence.known]
    return kinds


def _halves(lengths: Sequence[int], unit: str) -> list[str]:
    middle = int(median(lengths)) if lengths else 0
    return [f"up to {middle} {unit}" if length <= middle else f"over {middle} {unit}" for length in lengths]


def _steps(reference: str) -> str:
    steps = count_steps(reference)
    return f"{steps} step" if steps == 1 else f"{steps} steps" if steps < 4 else "4 steps or more"

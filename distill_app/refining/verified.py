"""Verification rounds: a student samples answers, and learns from those that are right.

Source: STaR, arXiv:2203.14465, which trains anew in each round; rejection sampling with several distinct
answers a problem, RFT, arXiv:2308.01825.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill_app.core.errors import EmptyDataError, TrainingError
from distill_app.core.files import Record, iter_records, new_folder, read_json, save_json, save_text
from distill_app.core.final_answers import final_answer, is_right
from distill_app.core.prompts import format_prompt
from distill_app.core.texts import normalise
from distill_app.data.frames import frame, masked
from distill_app.easydistill.job import Job, read_job, read_labeled
from distill_app.easydistill.run import run_easy_distill
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.engines import open_engine
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore
from distill_app.refining.params import RefineS2Params
from distill_app.refining.refine import add_records, csv_table
from distill_app.report.cards.origin import digest_of, file_digest, made_from, model_digest

COLUMNS = ("round", "right", "solved", "kept", "examples", "right_validation")
PACKAGES = ("torch", "transformers", "trl", "math-verify")
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class VerifiedInputs:
    """What verification rounds read.

    Args:
        student: the trained student, which samples in the first round.
        config_path: the config that it was trained by; each round trains by it, on more data.
        data_path: its training data, whose outputs name right answers.
        heldout_path: problems that no round may see.
    """

    student: str
    config_path: str
    data_path: str
    heldout_path: str


def refine_by_verification(
    params: RefineS2Params, label: LabelParams, inputs: VerifiedInputs, out_dir: str, metrics_path: str
) -> dict[str, Any]:
    """Let a student learn from its own right answers beside its training data, round after round.

    In each round the newest student samples answers to the problems. The right ones join those of earlier
    rounds, and a student is trained on them and the traces, from where `params.start` says. The folder
    appears at once when all is done: the last round's checkpoint, with `rounds.csv`. A run that was killed
    asks nothing again and goes on with the training that it was in; on a CPU it ends with the same bytes.

    Args:
        label: whose engine, batch size and store are used; the teacher itself is not asked.
        metrics_path: gets the metrics; `_rounds.csv` beside it a line a round.

    Returns:
        `rounds`, `problems`, `left_out` (for being like held-out ones), and the last round's columns: `right`
        (share of samples) and `solved` (share of problems with a right sample), of the student that sampled;
        `kept` (answers beside the traces), `examples` (both together), `right_validation` (share of right
        greedy answers to the problems that training validates by; missing where there are none).

    Raises:
        EmptyDataError: no problem or no right answer is left.
        TrainingError: a training failed.
        ValueError: a problem has no final answer, or the config is white-box.
    """
    from distill_app.training.work import work_folder

    job = _checked_job(inputs.config_path)
    traces = read_labeled(inputs.data_path)
    problems, left_out = read_problems(inputs.data_path, params.problems, inputs.heldout_path)
    origin = _origin(params, inputs, job)
    with work_folder(out_dir, origin) as work, AnswerStore(label.store) as store:
        rounds = _Rounds(params, label, inputs, job, store, traces, problems, work)
        found = [rounds.run(number) for number in range(1, params.rounds + 1)]
        metrics = {"rounds": params.rounds, "problems": len(problems), "left_out": left_out, **found[-1]}
        del metrics["round"]
        with new_folder(out_dir) as folder:
            shutil.copytree(rounds.model(params.rounds), folder, dirs_exist_ok=True)
            save_text(folder / "rounds.csv", rounds_csv(found))
            add_records(folder, Path(out_dir).name, inputs.student, metrics, origin)
    save_json(metrics_path, metrics)
    save_text(f"{Path(metrics_path).with_suffix('')}_rounds.csv", rounds_csv(found))
    return metrics


def rounds_csv(found: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of the rounds; without any the line of names alone."""
    return csv_table(COLUMNS, found)


def _checked_job(config_path: str) -> Job:
    job = read_job(config_path)
    if job.is_white_box:
        raise ValueError(
            "train_s2.kd_ratio: found above 0 with refine_s2.method: verified, expected 0: nobody knows the"
            " teacher's probabilities of the student's answers; set it to 0, or take method: on_policy"
        )
    return job


def read_problems(data_path: str, more_path: str | None, heldout_path: str) -> tuple[list[Record], int]:
    """Return the problems to sample for, and how many were left out for being like a held-out one.

    Left out are problems that are the text of a held-out one, or that text but for names and numbers, or of a
    frame that is held out: one that the training data does not have.

    Raises:
        EmptyDataError: none is left.
        ValueError: a problem has no final answer.
    """
    own = read_labeled(data_path)
    more = list(iter_records(more_path)) if more_path else []
    sources = [(data_path, number, record) for number, record in enumerate(own)]
    sources += [(str(more_path), number, record) for number, record in enumerate(more)]
    heldout = [_text(record) for record in iter_records(heldout_path)]
    texts, masks = set(map(normalise, heldout)), set(map(masked, heldout))
    frames = set(map(frame, heldout)) - {frame(_text(record)) for record in own}
    found: dict[str, Record] = {}
    for path, number, record in sources:
        text = _text(record)
        if not final_answer(record["output"]):
            shown = " ".join(record["output"].split())[:SHOWN_CHARACTERS]
            raise ValueError(
                f"{path}: record {number}: output: found no final answer in {shown!r}, expected \\boxed{{}}"
                ' or "the answer is", to verify by; add it, or take refine_s2.method: on_policy'
            )
        if normalise(text) not in texts and masked(text) not in masks and frame(text) not in frames:
            found.setdefault(normalise(text), record)
    if not found:
        raise EmptyDataError(
            f"{data_path}: all of {len(sources)} problems are like held-out ones; give others as"
            " refine_s2.problems"
        )
    distinct = len({normalise(_text(record)) for _, _, record in sources})
    return list(found.values()), distinct - len(found)


def _text(record: Record) -> str:
    return f"{record['instruction']} {record['input']}".strip()


class _Rounds:
    """The rounds of one refinement; round 0 is the trained student."""

    def __init__(
        self,
        params: RefineS2Params,
        label: LabelParams,
        inputs: VerifiedInputs,
        job: Job,
        store: AnswerStore,
        traces: Sequence[Record],
        problems: Sequence[Record],
        work: Path,
    ) -> None:
        self._params, self._label, self._inputs, self._job = params, label, inputs, job
        self._store, self._traces, self._problems, self._work = store, traces, problems, work
        self._kept: list[list[str]] = [[] for _ in problems]  # right answers so far, a list a problem

    def model(self, number: int) -> str:
        """Return the checkpoint that a round leaves."""
        return str(self._work / f"round-{number}" / "model") if number else self._inputs.student

    def run(self, number: int) -> dict[str, Any]:
        """Sample with the round before's student, train on what is right; return a line of the table."""
        answers = self._sample(number)
        right = [
            [_is_whole(answer) and bool(is_right(answer.text, problem["output"])) for answer in some]
            for problem, some in zip(self._problems, answers, strict=True)
        ]
        self._keep(answers, right)
        added = [
            {**problem, "output": text}
            for problem, texts in zip(self._problems, self._kept, strict=True)
            for text in texts
        ]
        if not added:
            raise EmptyDataError(
                f"{self._inputs.student}: none of its {self._params.samples} answers to each of"
                f" {len(self._problems)} problems is right; raise refine_s2.samples, or train it longer first"
            )
        examples = [*self._traces, *added]
        if not Path(self.model(number)).is_dir():
            self._train(number, examples)
        row = {
            "round": number,
            "right": round(_mean([ok for some in right for ok in some]), 4),
            "solved": round(_mean([any(some) for some in right]), 4),
            "kept": len(added),
            "examples": len(examples),
            **self._validated(number),
        }
        print(
            "refining:",
            ", ".join(f"{key} {value}" for key, value in row.items()),
            file=sys.stderr,
            flush=True,
        )
        return row

    def _sample(self, number: int) -> list[list[Answer]]:
        """Return for each problem the answers that the round before's student draws."""
        params = self._params
        drawn = Sampling(params.max_new_tokens, params.temperature)
        samplings = [replace(drawn, seed=params.seed + place) for place in range(params.samples)]
        return self._ask(number - 1, self._problems, samplings, f"refining: round {number}")

    def _ask(
        self, number: int, records: Sequence[Record], samplings: Sequence[Sampling], title: str
    ) -> list[list[Answer]]:
        """Return a round's student's answers, a list a record; what the store has is not asked."""
        where: dict[str, Any] = {
            "teacher": self.model(number),
            "revision": None,
            "quantization": "none",
            "engine": "vllm" if self._label.engine == "vllm" else "transformers",
            "system_prompt": None,
        }
        engine = open_engine(self._label.model_copy(update=where))
        prompts = [format_prompt(r["instruction"], r["input"], "system2") for r in records]
        try:
            answers = []
            for place, sampling in enumerate(samplings, 1):
                told = f"{title}, sample {place} of {len(samplings)}" if len(samplings) > 1 else title
                fill_store(engine, lambda: prompts, sampling, self._store, total=len(prompts), label=told)
                answers.append(list(read_answers(engine, prompts, sampling, self._store)))
        finally:
            engine.close()
        return [list(some) for some in zip(*answers, strict=True)]

    def _keep(self, answers: Sequence[Sequence[Answer]], right: Sequence[Sequence[bool]]) -> None:
        """Add the right answers that are not known yet to each problem's, up to `keep`."""
        known = {normalise(_text(record) + record["output"]) for record in self._traces}
        for problem, kept, some, verdicts in zip(self._problems, self._kept, answers, right, strict=True):
            seen = {normalise(text) for text in kept}
            for answer, verdict in zip(some, verdicts, strict=True):
                said = normalise(answer.text)
                is_new = said not in seen and normalise(_text(problem) + answer.text) not in known
                if verdict and is_new and len(kept) < self._params.keep:
                    seen.add(said)
                    kept.append(answer.text)

    def _train(self, number: int, examples: Sequence[Record]) -> None:
        """Train by the student's own config on these examples, as a child; a killed one goes on."""
        place = self._work / f"round-{number}"
        save_json(place / "examples.json", list(examples))
        config = read_json(self._inputs.config_path)
        config["dataset"]["labeled_path"] = str(place / "examples.json")
        config["training"]["output_dir"] = self.model(number)
        if self._params.start == "trained":
            config["models"]["student"] = self._inputs.student
            config["models"].pop("student_revision", None)
        save_json(place / "config.json", config)
        if code := run_easy_distill(str(place / "config.json")):
            raise TrainingError(
                f"refine_s2, round {number}: training failed with exit code {code}; the cause is above", code
            )

    def _validated(self, number: int) -> dict[str, float]:
        """Return the share of right greedy answers to the problems that training holds out."""
        from distill_app.training.examples import is_held_out

        fraction, seed = self._job.validation.fraction, self._job.dataset.seed
        records = [record for record in self._traces if is_held_out(record, fraction, seed)]
        if not records:
            return {}
        asked = self._ask(number, records, [Sampling(self._params.max_new_tokens)], "refining: validation")
        verdicts = [
            bool(is_right(answer.text, record["output"]))
            for record, (answer,) in zip(records, asked, strict=True)
        ]
        return {"right_validation": round(_mean(verdicts), 4)}


def _is_whole(answer: Answer) -> bool:
    return answer.finish_reason == "stop"


def _mean(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _origin(params: RefineS2Params, inputs: VerifiedInputs, job: Job) -> dict[str, Any]:
    """Return what a refinement is made from, without times, hosts or absolute paths."""
    started = inputs.student if params.start == "trained" else job.models.student
    used = {"rounds", "samples", "keep", "start", "temperature", "max_new_tokens", "seed"}
    return {
        "backend": "builtin",
        "job_type": "verified",
        **made_from(started, job.models.teacher, inputs.data_path, job.source, job.models.student_revision),
        "sampled_by_sha256": model_digest(inputs.student),
        "problems_sha256": file_digest(params.problems) if params.problems else None,
        "heldout_sha256": file_digest(inputs.heldout_path),
        "config_sha256": file_digest(inputs.config_path),
        "quantization": "none",
        "training": params.model_dump(include=used),
        "trainer_sha256": digest_of(sorted(Path(__file__).parent.glob("*.py"))),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }

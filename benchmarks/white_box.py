"""Words against probabilities: System 1 trained on the teacher's answers, with and without its distribution.

make bench-white-box

Every student starts from models/base/system1, sees the same answers in the same order for as many tokens,
and is judged on the held-out answers of the teacher: loss a token, and chrF of its own greedy answers.
Run `dvc repro label` first; the teacher's likeliest tokens are computed here.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from distill_app import load_student, write_system1_config
from distill_app.core.files import read_records
from distill_app.core.params import read_section
from distill_app.core.prompts import format_prompt, format_response
from distill_app.easydistill.params import TrainParams
from distill_app.easydistill.run import run_easy_distill
from distill_app.evaluation.scores import chrf
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import generate
from distill_app.labeling.likelihood import Reading, answer_nats
from distill_app.labeling.logits import write_top_logits
from distill_app.labeling.params import LabelParams

TRAIN, HELDOUT = "data/train_labeled.json", "data/heldout_s1_labeled.json"
SETTINGS: dict[str, dict[str, Any] | None] = {
    "words alone": None,
    "half forward KL": {"kd_ratio": 0.5},
    "forward KL alone": {"kd_ratio": 1.0},
    "forward KL alone, temperature 2": {"kd_ratio": 1.0, "temperature": 2.0},
    "half reverse KL": {"kd_ratio": 0.5, "distillation_type": "reverse_kld"},
}


def main() -> None:
    """Train and judge a student for each setting and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=32, help="likeliest tokens kept for each answer token")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-white-box-") as scratch:
        logits = f"{scratch}/logits.arrow"
        label = read_section("label", LabelParams).model_copy(update={"top_logits": args.top})
        write_top_logits(label, TRAIN, logits, f"{scratch}/log")
        for name in args.settings:
            found = [judge(train(Path(scratch), logits, SETTINGS[name], seed)) for seed in args.seeds]
            losses, overlaps = zip(*found, strict=True)
            print(
                f"{name}: loss {statistics.mean(losses):.3f} {[round(x, 3) for x in losses]},"
                f" chrF {statistics.mean(overlaps):.1f}",
                flush=True,
            )


def train(scratch: Path, logits: str, setting: dict[str, Any] | None, seed: int) -> str:
    """Return the checkpoint of a student trained as params.yaml says, but for the setting and the seed."""
    params = read_section("train_s1", TrainParams)
    extra: dict[str, Any] = {"backend": "builtin"}
    if setting is not None:
        extra |= {
            "job_type": "kd_white_box_train_only",
            "dataset": {"logits_path": logits},
            "distillation": setting,
        }
    config = write_system1_config(
        config_path=str(scratch / "config.json"),
        student_model=params.student,
        instruction_path=TRAIN,
        labeled_path=TRAIN,
        out_dir=str(scratch / "student"),
        num_epochs=params.num_epochs,
        training=params.training_options() | {"eval_steps": None},
        seed=seed,
        extra=extra,
    )
    if run_easy_distill(config):
        raise SystemExit(1)
    return str(json.loads(Path(config).read_text())["training"]["output_dir"])


def judge(checkpoint: str) -> tuple[float, float]:
    """Return the loss a token on the teacher's held-out answers, and how the student's overlap with them."""
    model, tokenizer = load_student(checkpoint)
    records = read_records(HELDOUT)
    prompts = [format_prompt(r["instruction"], r["input"]) for r in records]
    answers = [r["output"] for r in records]
    said = generate(model, tokenizer, prompts, Sampling(max_new_tokens=128))
    responses = [format_response(answer) for answer in answers]
    found = [one for one in answer_nats(Reading(model, tokenizer, prompts, responses)) if one]
    loss = sum(one["nats"] for one in found) / sum(one["tokens"] for one in found)
    overlaps = [chrf(answer.text, reference) for answer, reference in zip(said, answers, strict=True)]
    return loss, statistics.mean(overlaps)


if __name__ == "__main__":
    main()

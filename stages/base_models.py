"""Reads the teacher that a package carries; writes it and the students' starting points to models/base."""

from distill_app.base.build import build_base_models
from distill_app.base.params import BaseModelsParams
from distill_app.core.files import save_json
from distill_app.core.inputs import read_inputs
from distill_app.core.stage import run_stage


def main() -> None:
    """Build the base models."""
    params = read_inputs("base_models", BaseModelsParams)
    report = build_base_models(params, "models/base")
    save_json("metrics/base_models.json", report)
    print(f"base_models: teacher {params.teacher or 'not built here'} -> models/base")


if __name__ == "__main__":
    run_stage(main)

"""Profiles: whole parameter sets that `distill profile NAME` copies over params.yaml."""

import subprocess
from pathlib import Path

from distill_app.base.params import BaseModelsParams
from distill_app.benchmarking.params import BenchmarkParams
from distill_app.comparison.params import CompareParams
from distill_app.core.files import save_text
from distill_app.core.params import Section, read_params, read_section
from distill_app.data.params import PrepareS1Params, PrepareS2Params
from distill_app.easydistill.params import TrainParams, WordsAndProbabilities
from distill_app.labeling.params import LabelParams
from distill_app.measuring.params import MeasureParams

SECTIONS: dict[str, type[Section]] = {
    "base_models": BaseModelsParams,
    "prepare_s1": PrepareS1Params,
    "label": LabelParams,
    "prepare_s2": PrepareS2Params,
    "train_s1": WordsAndProbabilities,
    "train_s2": TrainParams,
    "measure": MeasureParams,
    "benchmark": BenchmarkParams,
    "compare": CompareParams,
}


def check_profile(path: str | Path) -> None:
    """Raise ValueError unless the file has exactly the sections and params that the code reads."""
    unknown = set(read_params(path)) - set(SECTIONS)
    if unknown:
        raise ValueError(f"{path}: unknown section {sorted(unknown)[0]}; expected {', '.join(SECTIONS)}")
    for name, model in SECTIONS.items():
        read_section(name, model, path)


def use_profile(name: str, folder: str = "profiles", params: str = "params.yaml") -> None:
    """Copy a profile over params.yaml, if that has no uncommitted edits.

    Raises:
        FileNotFoundError: there is no such profile; those that there are, are listed.
        ValueError: the profile does not fit the code, or params.yaml has uncommitted edits.
    """
    source = Path(folder) / f"{name}.yaml"
    if not source.is_file():
        known = ", ".join(sorted(p.stem for p in Path(folder).glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"{source}: no such profile; there are: {known}")
    check_profile(source)
    profiles = [path.read_bytes() for path in Path(folder).glob("*.yaml")]
    target = Path(params)
    if target.exists() and target.read_bytes() not in profiles and not _is_committed(params):
        raise ValueError(f"{params}: uncommitted edits would be lost; commit or undo them first")
    save_text(params, source.read_text(encoding="utf-8"))


def _is_committed(path: str) -> bool:
    command = ["git", "status", "--porcelain", "--", path]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return False
    return found.returncode == 0 and not found.stdout.strip()

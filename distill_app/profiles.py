"""Profiles: whole parameter sets that `distill profile NAME` copies over params.yaml."""

import subprocess
from pathlib import Path

from distill_app.base.params import BaseModelsParams
from distill_app.core.files import save_text
from distill_app.core.params import Section, read_params, read_section
from distill_app.data.params import PrepareS1Params, PrepareS2Params
from distill_app.easydistill.params import TrainParams
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.evaluation.benchmarks.params import BenchmarkParams
from distill_app.evaluation.params import CompareParams
from distill_app.labeling.params import LabelParams, ScoreParams
from distill_app.refining.params import RefineParams, RefineS2Params

SECTIONS: dict[str, type[Section]] = {
    "base_models": BaseModelsParams,
    "prepare_s1": PrepareS1Params,
    "label": LabelParams,
    "prepare_s2": PrepareS2Params,
    "score_s2": ScoreParams,
    "train_s1": TrainParams,
    "train_s2": TrainParams,
    "refine_s1": RefineParams,
    "refine_s2": RefineS2Params,
    "measure": MeasureParams,
    "benchmark": BenchmarkParams,
    "compare": CompareParams,
}


def check_profile(path: str | Path) -> None:
    """Raise ValueError unless the file has exactly the sections and params that the code reads."""
    unknown = set(read_params(path)) - set(SECTIONS)
    if unknown:
        raise ValueError(f"{path}: unknown section {sorted(unknown)[0]}; expected {', '.join(SECTIONS)}")
    read_sections(path)


def read_sections(path: str | Path) -> dict[str, Section]:
    """Return all sections of a params file, with the errors of `read_section`."""
    return {name: read_section(name, model, path) for name, model in SECTIONS.items()}


def use_profile(name: str, folder: str = "profiles", params: str = "params.yaml") -> None:
    """Copy a profile over params.yaml, if what that holds is not lost: HEAD or a profile has the same bytes.

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
        raise ValueError(
            f"{params}: uncommitted edits would be lost; commit or undo them first, or keep them as"
            f" {folder}/NAME.yaml"
        )
    save_text(params, source.read_text(encoding="utf-8"))


def _is_committed(path: str) -> bool:
    """Tell whether HEAD has these bytes; of ignored and skipped files `git status` says nothing."""
    committed = _git(
        "rev-parse", "--verify", "--quiet", f"HEAD:./{Path(path).name}", folder=Path(path).parent
    )
    return committed is not None and committed == _git("hash-object", "--", path)


def _git(*arguments: str, folder: Path = Path()) -> str | None:
    """Return what git prints; None where it fails, or is not installed."""
    command = ["git", *arguments]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout if found.returncode == 0 else None

"""Distils a large teacher into two small students. The public functions load on first use."""

from importlib import import_module
from typing import Any

_HOME = {
    "distill_system1": "api",
    "distill_system2": "api",
    "compare_models": "api",
    "prepare_system1_dataset": "api",
    "prepare_system2_dataset": "api",
    "load_teacher": "core.models",
    "load_student": "core.models",
    "infer_student": "generation.infer",
    "format_prompt": "core.prompts",
    "label_with_teacher": "labeling.label",
    "write_system1_config": "easydistill.config",
    "write_system2_config": "easydistill.config",
    "run_easy_distill": "easydistill.run",
    "save_json": "core.files",
    "read_json": "core.files",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

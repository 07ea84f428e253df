"""Reading params.yaml: each section against the typed model of the area that uses it."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """One section of params.yaml: every key needed, none unknown, no type guessed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


SectionType = TypeVar("SectionType", bound=Section)


def read_section(
    name: str, model: type[SectionType], path: str | os.PathLike[str] = "params.yaml"
) -> SectionType:
    """Return section `name` of a params file.

    Raises:
        FileNotFoundError: there is no params file.
        ValueError: it is not YAML, or a key is missing, unknown or of another type; one line.
    """
    params = read_params(path)
    if not isinstance(params.get(name), dict):
        raise ValueError(f"{path}: no section {name}; add it, or copy a profile over the file")
    return check_section(params[name], name, model, path)


def check_section(
    values: Any, name: str, model: type[SectionType], path: str | os.PathLike[str]
) -> SectionType:
    """Return values of section `name` as its model; the file's path is for the error alone.

    Raises:
        ValueError: a key is missing, unknown or of another type; one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as err:
        raise ValueError(f"{path}: {_first_fault(name, model, err)}") from None


def read_params(path: str | os.PathLike[str] = "params.yaml") -> dict[str, Any]:
    """Return all sections of a params file, unchecked."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run from the project's root")
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as err:
        raise ValueError(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(params, dict):
        raise ValueError(f"{path}: found {type(params).__name__}, expected sections of params")
    return params


def _first_fault(name: str, model: type[Section], err: ValidationError) -> str:
    fault = err.errors()[0]
    key = ".".join([name, *map(str, fault["loc"])])
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(str(fault["loc"][-1]), list(model.model_fields), n=1)
        return f"{key}: unknown parameter; " + (f"did you mean {near[0]}?" if near else "remove it")
    if fault["type"] == "missing":
        return f"{key}: missing; add it"
    found = fault["input"]
    hint = _number_hint(found)
    return f"{key}: found {found!r} ({type(found).__name__}): {fault['msg'].lower()}{hint}"


def _number_hint(found: Any) -> str:
    """YAML 1.1 reads 5e-4 as text; only 5.0e-4 is a number."""
    if isinstance(found, str) and "e" in found.lower():
        try:
            return f"; YAML reads it as text, write {float(found):f}".rstrip("0")
        except ValueError:
            return ""
    return ""

"""Reading params.yaml: each section against the typed model of the area that uses it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator


class Section(BaseModel):
    """One section of params.yaml: every key needed, none unknown, no type guessed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """Put the home folder in place of `~`, which a shell does not see in a file."""
        if isinstance(value, list):
            return [cls._at_home(item) for item in value]
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value

    def hosted(self) -> set[str]:
        """Return the params that name a model as its server does, so that nothing of it is read here."""
        return set()


SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class NoPath:
    """Marks a param, as `Annotated[str, NoPath()]`, whose text is no path even where a file has that name."""


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
    params = read_yaml(path)
    if not isinstance(params, dict):
        raise ValueError(f"{path}: found {type(params).__name__}, expected sections of params")
    return params


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return what is wrong with a key and what to do: take the known one that it is like, or remove it."""
    near = get_close_matches(key, list(known), n=1)
    return "unknown key; " + (f"did you mean {near[0]}?" if near else "remove it")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return what a YAML file holds, read as DVC reads it: YAML 1.2, where 2e-05 is a number and `on` text.

    Raises:
        ValueError: it is not YAML, or says a key twice; the line is named.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: byte {err.start} is not UTF-8; save the file as UTF-8") from err
    except YAMLError as err:
        raise ValueError(f"{path}: not YAML: {yaml_fault(err)}") from err


def yaml_fault(err: Exception) -> str:
    """Return where and what is wrong, without the advice that ruamel.yaml appends."""
    mark, problem = getattr(err, "problem_mark", None), getattr(err, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(err).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"


def texts(section: Section) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and value of each param that could name a file: of text, and no fixed choice.

    Nested sections and the items of lists and mappings are among them; `hosted` params are not.
    """
    for name, field in type(section).model_fields.items():
        marked = any(isinstance(mark, NoPath) for mark in field.metadata)
        if name not in section.hosted() and not marked and _holds_text(field.annotation):
            yield from _texts_in(name, getattr(section, name))


def _texts_in(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Section):
        yield from ((f"{key}.{name}", text) for name, text in texts(value))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts_in(f"{key}.{name}", item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts_in(key, item)


def _holds_text(kind: Any) -> bool:
    """Tell whether a field's type has room for text that is no fixed choice."""
    if get_origin(kind) is Literal:
        return False
    if isinstance(kind, type) and not get_args(kind):
        return kind is str or issubclass(kind, Section)
    return any(map(_holds_text, get_args(kind)))


def _first_fault(name: str, model: type[BaseModel], err: ValidationError) -> str:
    """Return a fault in one line; an unknown key first, since it may explain one that is missing."""
    faults = err.errors()
    fault = next((found for found in faults if found["type"] == "extra_forbidden"), faults[0])
    *places, last = map(str, fault["loc"])
    key = ".".join(filter(None, [name, *places, last]))
    section = _section_at(model, places)
    if fault["type"] == "extra_forbidden":
        return f"{key}: {unknown_key(last, section.model_fields)}"
    if fault["type"] == "missing":
        return f"{key}: missing; add it"
    if fault["type"] == "value_error":  # of a validator of ours, which says all
        return f"{key}: {fault['ctx']['error']}"
    found = fault["input"]
    kind = type(found).__name__
    if fault["type"] in ("model_type", "dict_type"):
        return f"{key}: found {kind}, expected an object of keys and values"
    if last in section.model_fields and not section.model_fields[last].repr:  # a secret
        return f"{key}: found {kind}: {fault['msg'].lower()}"
    hint = "; write true or false" if kind == "str" and fault["type"] == "bool_type" else number_hint(found)
    return f"{key}: found {found!r} ({kind}): {fault['msg'].lower()}{hint}"


def _section_at(model: type[BaseModel], places: Iterable[str]) -> type[BaseModel]:
    """Return the innermost section that holds a key, as far as the way to it leads through sections."""
    for place in places:
        field = model.model_fields.get(place)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            break
        model = field.annotation
    return model


def number_hint(found: Any) -> str:
    """Return what to write in place of a number that is text, since it stands in quotes."""
    try:
        return (
            f"; write {found} without quotes" if isinstance(found, str) and float(found) is not None else ""
        )
    except ValueError:
        return ""

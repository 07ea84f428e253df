"""What a stage opens: local paths lie under its deps in dvc.yaml, Hub repositories are read at a commit."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_app.core.hub import read_at_commits
from distill_app.core.params import SectionType, read_section, read_yaml, texts

GRAPH = "dvc.yaml"


def read_inputs(stage: str, model: type[SectionType], section: str | None = None) -> SectionType:
    """Return a section of params.yaml (the stage's own by default) for a stage that opens what it names.

    Of the section, what dvc.yaml lists among the stage's params is checked: a param that it does not list
    changes no output. What the Hub has and no commit pins, is pinned to the commit of now, for this run.

    Raises:
        FileNotFoundError: there is no params file.
        ValueError: a param is wrong, or names a local path that no dep of the stage covers; one line.
    """
    name = section or stage
    params = read_section(name, model)
    listed = _params_of(_stages().get(stage, {}))
    named = [(f"{name}.{key}", text) for key, text in texts(params)]
    require_deps(stage, "params.yaml", [(key, text) for key, text in named if _is_listed(key, listed)])
    return read_at_commits(stage, name, params)


def require_deps(stage: str, source: str, named: Iterable[tuple[str, str]]) -> None:
    """Make sure that DVC notices an edit of what a stage opens; without a dvc.yaml nothing is asked.

    Args:
        source: the file that names the paths, for the error.
        named: keys and texts; a text counts where a file or folder has that name or a stage makes one, and
            so do the linked folders in a folder, into which DVC does not look.

    Raises:
        ValueError: paths that no dep covers, with the lines to add.
    """
    stages = _stages()
    if stage not in stages:
        return
    deps = _paths(stages[stage].get("deps"))
    made = [out for entry in stages.values() for out in _paths(entry.get("outs"))]
    unseen = {
        path: key
        for key, text in named
        for path in _local_paths(text, made)
        if not any(_sees(dep, path) for dep in deps)
    }
    if unseen:
        keys = ", ".join(dict.fromkeys(unseen.values()))
        lines = ", ".join(f"- {_as_dep(path)}" for path in unseen)
        raise ValueError(
            f"{source}: {keys}: local, and no dep of stage {stage} covers it, so an edit would rerun nothing;"
            f" add to stages.{stage}.deps in {GRAPH}: {lines}"
        )


def _stages() -> dict[str, dict[str, Any]]:
    graph = read_yaml(GRAPH) if Path(GRAPH).is_file() else None
    return (graph or {}).get("stages") or {}


def _params_of(stage: dict[str, Any]) -> list[str]:
    """Return the params of params.yaml that a stage lists; those of other files are mappings."""
    listed: list[str] = []
    for item in stage.get("params") or []:
        listed += [item] if isinstance(item, str) else item.get("params.yaml") or []
    return listed


def _is_listed(key: str, listed: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in listed)


def _paths(items: Iterable[Any] | None) -> list[str]:
    """Return the paths of deps or outs; an item with options is a mapping of its path to them."""
    return [path for item in items or [] for path in ([item] if isinstance(item, str) else item)]


def _local_paths(text: str, made: Iterable[str]) -> Iterator[str]:
    if not os.path.lexists(text):
        if any(Path(os.path.abspath(text)).is_relative_to(os.path.abspath(out)) for out in made):
            yield text
        return
    yield text
    for folder, names, _ in os.walk(text):
        yield from (path for name in names if os.path.islink(path := os.path.join(folder, name)))


def _sees(dep: str, path: str) -> bool:
    """Tell whether DVC, hashing a dep, reads a path: as they are written, or where they lead."""
    written = Path(os.path.abspath(path)), Path(os.path.abspath(dep))
    return any(_is_walked(*pair) for pair in (written, (Path(path).resolve(), Path(dep).resolve())))


def _is_walked(path: Path, dep: Path) -> bool:
    """Tell whether a walk from the dep reaches the path; it goes through no linked folder but the dep."""
    if not path.is_relative_to(dep):
        return False
    steps = path.relative_to(dep).parts
    between = (dep.joinpath(*steps[: count + 1]) for count in range(len(steps)))
    return not any(step.is_symlink() and step.is_dir() for step in between)


def _as_dep(path: str) -> str:
    """Return a path as dvc.yaml has it: from the project's root, or absolute outside it."""
    full = Path(os.path.abspath(path))
    return full.relative_to(Path.cwd()).as_posix() if full.is_relative_to(Path.cwd()) else full.as_posix()

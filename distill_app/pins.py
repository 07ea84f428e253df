"""Pins: the Hub's repositories that a params file names, and the commits that it holds them at."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_app.core.files import save_text
from distill_app.core.hub import HubInput, ask_commit, hub_inputs, set_at
from distill_app.core.params import read_params
from distill_app.core.stage import one_line
from distill_app.profiles import read_sections


@dataclass(frozen=True)
class Pin:
    """A Hub input, and the commit that its branch or tag is now or the reason why that is not known."""

    input: HubInput
    commit: str | None
    fault: str = ""

    def state(self) -> str:
        """Return in words how the params stand to the Hub."""
        pinned = self.input.revision if self.input.is_pinned else None
        if self.commit is None:
            return f"{f'pinned at {pinned}' if pinned else 'not pinned'}; {self.fault}"
        now = f"{self.input.branch} is now {self.commit}"
        if pinned is None:
            return f"not pinned; {now}"
        return f"pinned at {pinned}" if pinned == self.commit else f"{now}, pinned is {pinned}"


def find_pins(params: str, chosen: Sequence[str] = ()) -> list[Pin]:
    """Return the Hub inputs of a params file with what their branches and tags are now.

    Args:
        chosen: names of params (label.teacher) or sections (label); none takes all.

    Raises:
        FileNotFoundError, ValueError: the file is missing or wrong, or a name is none of a Hub input.
    """
    inputs = [item for name, section in read_sections(params).items() for item in hub_inputs(name, section)]
    for name in chosen:
        if not any(_is_named(item, name) for item in inputs):
            known = ", ".join(item.name for item in inputs) or "none"
            raise ValueError(f"{params}: {name}: no input from the Hub; expected one of: {known}")
    wanted = [item for item in inputs if not chosen or any(_is_named(item, name) for name in chosen)]
    return [_look_up(item) for item in wanted]


def _is_named(item: HubInput, name: str) -> bool:
    return item.name == name or item.name.startswith(f"{name}.")


def _look_up(item: HubInput) -> Pin:
    """Ask the Hub; a pinned input is held against the main branch."""
    try:
        return Pin(item, ask_commit(item.repo, None if item.is_pinned else item.revision, item.kind))
    except OSError as err:
        return Pin(item, None, one_line(err))


def write_pins(params: str, pins: Sequence[Pin]) -> None:
    """Put the commits into a params file and leave every other byte of it as it is.

    Raises:
        OSError: a commit is not known; nothing is written.
        ValueError: a revision is written so that it cannot be replaced alone (an anchor); nothing is written.
    """
    for pin in pins:
        if pin.commit is None:
            raise OSError(f"{params}: {pin.input.name}: {pin.fault}; nothing is pinned")
    text, expected = Path(params).read_bytes().decode("utf-8"), read_params(params)
    for pin in pins:
        text = _with_value(text, pin.input.revision_keys, str(pin.commit))
        set_at(expected, pin.input.revision_keys, str(pin.commit))
    if _read(text) != expected:
        wanted = ", ".join(f"{pin.input.name} {pin.commit}" for pin in pins)
        raise ValueError(f"{params}: its revisions cannot be replaced alone; write them yourself: {wanted}")
    save_text(os.path.realpath(params), text)


def _read(text: str) -> Any:
    """Return what YAML text holds; nothing where it is none."""
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(text)
    except YAMLError:
        return None


def _with_value(text: str, keys: Sequence[str | int], value: str) -> str:
    """Return YAML text with another value for a key, written where the old one stands."""
    from ruamel.yaml import YAML

    name: Any = None
    node: Any = YAML().compose(text)
    for key in keys:
        name, node = (name, node.value[key]) if isinstance(key, int) else _entry(node, key)
    start, end = node.start_mark.index, node.end_mark.index
    written = value if isinstance(_read(value), str) else json.dumps(value)  # digits alone are a number
    if start == end:  # nothing, as DVC writes null: then the marks are those of whatever comes next
        start = end = text.index(":", name.end_mark.index) + 1
        written = f" {written}"
    return text[:start] + written + text[end:]


def _entry(node: Any, key: str) -> tuple[Any, Any]:
    """Return the nodes of a mapping's key and value."""
    return next((name, value) for name, value in node.value if name.value == key)

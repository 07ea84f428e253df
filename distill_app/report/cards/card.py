"""A checkpoint's README.md as the Hub reads it: YAML metadata, then what a person must know to use it.

Source of the metadata's keys: the Hub's model card specification, which `huggingface_hub` writes and reads.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_app.core.files import read_json
from distill_app.report.cards.origin import LICENSE_KEYS, front_matter, unplaced

CARD = "README.md"
UNKNOWN = "unknown"  # a licence that the Hub knows by that name
TAGS = ["distillation", "conversational"]


def training_card(name: str, origin: Mapping[str, Any], validation: Mapping[str, Any] | None = None) -> str:
    """Return the card that training writes: parents, licences, data, recipe, and training's own scores.

    Args:
        name: of the model, its folder's.
        origin: what it was made from, as in provenance.json; whatever is missing there, the card says is
            not known.
        validation: of examples held out of training: `examples`, how many, and `loss` and `before` (None
            where it was not measured), figures `{value, low, high}` in nats a token.
    """
    from huggingface_hub import EvalResult, ModelCardData

    student = origin.get("student") or {"model": UNKNOWN, "sha256": None}
    teacher = origin.get("teacher")
    results = []
    if validation is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="json",
                dataset_name=f"{validation['examples']} examples held out of training",
                dataset_split="validation",
                metric_type="loss",
                metric_name=f"loss a token in nats{interval_name(validation['loss'], '%.3f')}",
                metric_value=round(validation["loss"]["value"], 4),
            )
        ]
    data = ModelCardData(
        base_model=student.get("base_model"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=name,
        eval_results=results or None,
        **({"license": UNKNOWN} | {key: student[key] for key in LICENSE_KEYS if key in student}),
    )
    if not results:
        data.pop("model_name")
    body = _template("card.md.jinja").render(
        name=name,
        teacher=teacher,
        student=student,
        parents=[("student", student), *([("teacher", teacher)] if teacher else [])],
        data=origin.get("data"),
        source=origin.get("source"),
        examples=origin.get("examples"),
        probabilities=origin.get("probabilities"),
        recipe=[(key, " ".join(str(value).replace("|", "\\|").split())) for key, value in _recipe(origin)],
        validation=_shown_validation(validation),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def own_card(folder: Path) -> str:
    """Return the card that training wrote into a checkpoint; where there is none, what can be said of it."""
    if front_matter(folder / CARD):
        return (folder / CARD).read_text(encoding="utf-8")
    origin = folder / "provenance.json"
    return training_card(folder.name, read_json(origin) if origin.is_file() else {})


def _recipe(origin: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the settings that the training was started with."""
    yield from ((key, origin[key]) for key in ("backend", "job_type", "quantization") if origin.get(key))
    yield from (origin.get("training") or {}).items()
    for section in ("lora", "probabilities"):
        found = origin.get(section) or {}
        skipped = ("path", "sha256", "teacher")
        yield from ((f"{section}: {key}", value) for key, value in found.items() if key not in skipped)
    yield from ((key, origin[key]) for key in ("seed", "processes") if key in origin)
    if versions := origin.get("versions"):
        yield "versions", ", ".join(f"{package} {version}" for package, version in versions.items())


def _shown_validation(validation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if validation is None:
        return None
    named = {"before training": validation.get("before"), "this model": validation["loss"]}
    return {
        "examples": validation["examples"],
        "figures": [(name, figure) for name, figure in named.items() if figure],
    }


def _interval(figure: Mapping[str, Any], style: str) -> str:
    if figure["low"] is None or figure["high"] is None:
        return "not known"
    return f"{style % figure['low']} to {style % figure['high']}"


def interval_name(figure: Mapping[str, Any], style: str) -> str:
    """Return what a metric's name says of its interval: the metadata has no place of its own for it."""
    known = figure["low"] is not None and figure["high"] is not None
    return f" (95% interval {_interval(figure, style)})" if known else ""


def _license(parent: Mapping[str, Any]) -> str:
    license = parent.get("license") or UNKNOWN
    name = parent.get("license_name")
    return f"{_text(license)} ({_text(name)})" if name else _text(license)


def _digest(parent: Mapping[str, Any]) -> str:
    if parent.get("commit"):
        return f"commit {_code(parent['commit'])}"
    if parent.get("revision"):
        return f"revision {_code(parent['revision'])}"
    return _code(parent["sha256"]) if parent["sha256"] else "not known here"


def _base(parent: Mapping[str, Any]) -> str:
    base = _text(parent.get("base_model") or "not known here")
    cut = parent.get("made_from") or {}
    if not cut.get("dropped_layers"):
        return base
    layers = ", ".join(map(str, cut["dropped_layers"]))
    return f"{base}, by way of {_code(cut['model'])} without its layers {layers}"


def _named(parent: Mapping[str, Any]) -> str:
    """Return what a reader knows a model by: its name on the Hub, else its folder's."""
    model, base = parent["model"], parent.get("base_model")
    return f"{_text(base)} ({_code(model)})" if base and base != model else _code(model)


def _text(value: Any) -> str:
    """Return words of another's card as one line that Markdown shows as it is."""
    line = " ".join((value if isinstance(value, str) else ", ".join(map(str, value))).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _code(path: str) -> str:
    return "`" + " ".join(unplaced(path).split()).replace("`", "'").replace("|", "\\|") + "`"


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "code": _code,
        "named": _named,
        "base": _base,
        "license": _license,
        "digest": _digest,
        "interval": _interval,
    }
    return environment.get_template(name)

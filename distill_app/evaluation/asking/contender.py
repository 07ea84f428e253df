"""A model that is asked: its engine, and its weights where they are here."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from distill_app.core.files import Record
from distill_app.core.models import Model, Tokenizer, load_teacher, load_tokenizer
from distill_app.core.prompts import Mode, format_prompt
from distill_app.core.stage import one_line
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.evaluation.candidates import Candidate
from distill_app.generation.answers import Engine
from distill_app.generation.engines import open_engine
from distill_app.generation.identity import engine_identity, resolve_weights
from distill_app.generation.in_process import InProcess
from distill_app.labeling.params import LabelParams

Task = Literal["instructions", "reasoning"]
TASKS: dict[Task, Mode] = {"instructions": "system1", "reasoning": "system2"}


@dataclass
class Contender:
    """One of the models, ready to be asked; its weights are loaded when they are first needed."""

    candidate: Candidate
    engine: Engine
    revision: str | None

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def has_weights(self) -> bool:
        """Tell whether its weights are here, and not a server's alone."""
        return self.candidate.base_url is None

    @cached_property
    def loaded(self) -> tuple[Model, Tokenizer]:
        return load_teacher(self.candidate.model, self.candidate.quantization, self.revision)

    @property
    def model(self) -> Model:
        return self.loaded[0]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.candidate.model, self.revision)

    @property
    def tasks(self) -> list[Task]:
        """Return what it is asked: a student its own task, the teacher both."""
        if self.name == "teacher":
            return list(TASKS)
        return [task for task, mode in TASKS.items() if self.name.startswith(mode)]

    def prompt(self, task: Task, record: Record) -> str:
        """Return a prompt as its engine takes it; a student's is the one that it was trained on."""
        mode, text = self.candidate.mode, (record["instruction"], record["input"])
        if mode is None:
            return self.engine.render(*text, TASKS[task])
        if self.engine.identity["engine"] == "openai":
            return self.engine.render(*text, "system1")  # the server has its chat template
        return format_prompt(*text, mode)

    def close(self) -> None:
        """Let go of engine and weights."""
        self.engine.close()
        self.__dict__.pop("loaded", None)


def open_contender(candidate: Candidate, params: MeasureParams, label: LabelParams) -> Contender:
    """Return a contender with its engine open; no weights are loaded yet.

    Raises:
        FileNotFoundError, OSError: its weights or tokenizer are not to be had.
        ImportError: the engine is not installed.
        ValueError: with `measure.engine: openai` nothing says where it is served.
    """
    url = candidate.base_url
    if url is None and params.engine == "openai":
        url = params.servers.get(candidate.name)
        if url is None:
            raise ValueError(
                f"measure.servers: found no {candidate.name}, expected its server's address with"
                " measure.engine: openai, for example http://localhost:8000/v1; add it"
            )
    where: dict[str, Any] = {
        "teacher": candidate.model,
        "revision": candidate.revision,
        "quantization": candidate.quantization,
        "engine": "openai" if url else params.engine,
        "base_url": url,
        "system_prompt": label.system_prompt if candidate.name == "teacher" else None,
        "batch_api": False,  # which would time the queue
        "engine_workers": 1,  # how labelling is spread says nothing of the comparison
        "ray_address": None,
        "batch_size": params.batch_size,
    }
    changed = label.model_copy(update=where)
    if url is None and params.engine == "transformers":
        return _in_process(candidate, changed, params.batch_size)
    try:
        engine = open_engine(changed)
    except (ValueError, OSError, ImportError) as err:
        raise type(err)(f"measure.engine: {one_line(err).replace('label.', 'measure.')}") from err
    revision = None if candidate.base_url else resolve_weights(candidate.model, candidate.revision)[1]
    return Contender(candidate, engine, revision)


def _in_process(candidate: Candidate, label: LabelParams, batch_size: int) -> Contender:
    """Return a contender whose engine answers with the weights that the other measures read, loaded once."""
    identity, revision = engine_identity(label)
    tokenizer = load_tokenizer(candidate.model, revision)
    contender: Contender
    engine = InProcess(
        candidate.model, identity, tokenizer, lambda: contender.model, batch_size, label.system_prompt
    )
    contender = Contender(candidate, engine, revision)
    return contender

"""The engine that runs in this process, on transformers; the default."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill_app.core.models import Model, Tokenizer
from distill_app.core.prompts import Mode, teacher_prompt
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.batch import stream_answers


class InProcess:
    """A model in this process; it is loaded when the first answer is asked for.

    Args:
        load_model: called once, when it is needed.
        batch_size: answers generated at a time; changes speed and memory, not the answers.
        system_prompt: what the model is told before each prompt; None leaves it to its chat template.
    """

    def __init__(
        self,
        teacher: str,
        identity: dict[str, Any],
        tokenizer: Tokenizer,
        load_model: Callable[[], Model],
        batch_size: int,
        system_prompt: str | None = None,
    ) -> None:
        self.teacher, self.identity = teacher, identity
        self._tokenizer, self._load_model, self._batch_size = tokenizer, load_model, batch_size
        self._system_prompt = system_prompt
        self._model: Model | None = None

    def render(self, instruction: str, input_text: str, mode: Mode) -> str:
        return teacher_prompt(self._tokenizer, instruction, input_text, mode, self._system_prompt)

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        if self._model is None:
            self._model = self._load_model()
        yield from stream_answers(self._model, self._tokenizer, prompts, sampling, self._batch_size)

    def close(self) -> None:
        self._model = None

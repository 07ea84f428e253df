"""A model behind a server, as the harness sees it: it writes answers, and cannot say how likely a text is."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from distill_app.evaluation.benchmarks.tasks import Benchmark
from distill_app.generation.answers import Engine, Sampling
from distill_app.labeling.ask import fill_store, read_answers
from distill_app.labeling.store import AnswerStore

DEFAULT_LIMIT = 256  # tokens, as the harness has it for a task that says nothing
GENERATES = "generate_until"  # the harness's word for a task of which the model writes the answer


def answerable(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    """Return the benchmarks that a server can be asked: those of which the model writes each answer."""
    return [one for one in benchmarks if all(task.OUTPUT_TYPE == GENERATES for task in one.tasks)]


class Hosted(LM):
    """A server's model. What it answered is kept in the store, so that no answer is paid for twice.

    Args:
        engine: takes the messages of a chat as JSON.
        stderr: where to say how far it is.
    """

    def __init__(self, engine: Engine, store: AnswerStore, stderr: TextIO) -> None:
        super().__init__()
        self._engine, self._store, self._stderr = engine, store, stderr
        self._chats: set[str] = set()

    @cached_property
    def tokenizer_name(self) -> str:
        """Name the chat template, which is the server's."""
        return self._engine.teacher

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as the engine takes them; the template is the server's."""
        chat = json.dumps(chat_history, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self._chats.add(chat)
        return chat

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers, each ended before its task's first stopping text."""
        prompts = [self._prompt(str(request.args[0])) for request in requests]
        settings = [request.args[1] for request in requests]
        answers = [""] * len(requests)
        for sampling in dict.fromkeys(map(_sampling, settings)):
            places = [n for n, one in enumerate(settings) if _sampling(one) == sampling]
            asked = [prompts[place] for place in places]
            with contextlib.redirect_stderr(self._stderr):
                fill_store(
                    self._engine,
                    asked.__iter__,
                    sampling,
                    self._store,
                    total=len(asked),
                    label=f"benchmark: {self._engine.teacher}",
                )
            found = read_answers(self._engine, asked, sampling, self._store)
            for place, answer in zip(places, found, strict=True):
                answers[place] = _ended(answer.text, settings[place])
        return answers

    def _prompt(self, context: str) -> str:
        """Return a context as messages; a task's own text, without a chat template, is the user's words."""
        return context if context in self._chats else self._engine.render(context, "", "system1")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raise: a chat gives no probability of a text that the model did not write."""
        raise NotImplementedError("a server's chat gives no log-probabilities of choices")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raise: a chat gives no probability of a text that the model did not write."""
        raise NotImplementedError("a server's chat gives no log-probabilities of texts")


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    is_drawn = bool(settings.get("do_sample"))
    return Sampling(
        max_new_tokens=int(settings.get("max_gen_toks") or DEFAULT_LIMIT),
        temperature=float(settings.get("temperature") or 1.0) if is_drawn else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
    )


def _ended(text: str, settings: Mapping[str, Any]) -> str:
    """Return a text up to the first of its task's stopping texts, which are not sent to the server."""
    until = settings.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.partition(stop)[0]
    return text

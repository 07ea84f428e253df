"""A conversation with one model: what was said, and the next answer as it is written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from distill_app.core.models import Model, Tokenizer
from distill_app.generation.answers import Sampling
from distill_app.generation.batch import stream_answers


@dataclass(frozen=True)
class Reply:
    """An answer without outer blanks.

    `tokens` counts what was generated, the end of sequence included; `seconds` reading the prompt too.
    `finish` is "length" for an answer cut at the token limit or where the model's positions end, and
    "interrupted" after Ctrl-C. `forgotten` counts earlier turns, of question and answer, that had to go.
    """

    text: str
    tokens: int
    seconds: float
    finish: Literal["stop", "length", "interrupted"]
    forgotten: int

    @property
    def tokens_per_sec(self) -> float:
        return self.tokens / self.seconds


class Conversation:
    """Turns with one model, each a question and its answer."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.turns: list[tuple[str, str]] = []
        self.asked = 0
        self.longest = getattr(model.config, "max_position_embeddings", None) or 2**31

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def ask(self, question: str, sampling: Sampling, write: Callable[[str], object]) -> Reply:
        """Answer a question after those before it; `write` gets the answer's words as they come.

        Each question draws with a seed of its own, so that a question asked again gets another answer, and
        the same session the same answers. Ctrl-C ends the answer; what was written of it counts as said.
        Where the conversation and an answer would exceed the model's positions, its oldest turns are
        forgotten.

        Raises:
            ValueError: the question alone is too long for the model, or its attention is of a kind that the
                engine cannot run.
        """
        import torch

        prompt, tokens, forgotten = self._fitting(question, sampling.max_new_tokens)
        limit = min(sampling.max_new_tokens, self.longest - tokens)
        drawn = replace(sampling, max_new_tokens=limit, seed=sampling.seed + self.asked)
        self.asked += 1
        words = _words(self.tokenizer, write)
        finish: Literal["stop", "length", "interrupted"] = "length"
        start = time.perf_counter()

        def say(place: int, token: int) -> None:
            words.put(torch.tensor([token]))

        try:
            ((_, answer),) = stream_answers(self.model, self.tokenizer, [prompt], drawn, 1, say)
            finish = "stop" if answer.finish_reason == "stop" else "length"
        except KeyboardInterrupt:
            finish = "interrupted"
        words.end()
        seconds = time.perf_counter() - start
        if words.text or finish != "interrupted":
            self.turns.append((question, words.text))
        return Reply(words.text, words.tokens, seconds, finish, forgotten)

    def _fitting(self, question: str, max_new_tokens: int) -> tuple[str, int, int]:
        """Return the prompt, its tokens, and how many old turns are forgotten to leave an answer room."""
        room = min(max_new_tokens, self.longest // 2)
        turns, before = self.turns, len(self.turns)
        prompt, tokens = self._rendered(turns, question)
        while turns and tokens + room > self.longest:
            turns = turns[1:]
            prompt, tokens = self._rendered(turns, question)
        if tokens >= self.longest:
            raise ValueError(
                f"question: found {tokens} tokens, expected fewer than {self.longest}, the model's"
                " positions; ask a shorter one"
            )
        self.turns = turns
        return prompt, tokens, before - len(turns)

    def _rendered(self, turns: list[tuple[str, str]], question: str) -> tuple[str, int]:
        """Return the turns and a question as the model reads them, and how many tokens that is."""
        messages = []
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _words(tokenizer: Tokenizer, write: Callable[[str], object]) -> Any:
    """Return a streamer that takes tokens and hands on whole words; it keeps `text` and counts `tokens`."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        text, blanks, tokens = "", "", 0

        def put(self, value: Any) -> None:
            self.tokens += 1
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Hand on all but the blanks at either end."""
            text = self.blanks + text if self.text else text.lstrip()
            word = text.rstrip()
            self.blanks = text[len(word) :]
            self.text += word
            if word:
                write(word)

    return Words(tokenizer, skip_special_tokens=True)

"""A conversation with one model: what was said, and the next answer as it is written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from distill_app.core.models import Model, Tokenizer
from distill_app.labeling.answers import Sampling
from distill_app.labeling.engine import stop_tokens


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
        from transformers import GenerationConfig

        self.model, self.tokenizer = model, tokenizer
        self.turns: list[tuple[str, str]] = []
        self.stops = stop_tokens(model, tokenizer)
        self.longest = getattr(model.config, "max_position_embeddings", None) or 2**31
        # In place of the checkpoint's own, which may ask for sampling
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.stops) or None, pad_token_id=tokenizer.pad_token_id, use_cache=True
        )

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def ask(self, question: str, sampling: Sampling, write: Callable[[str], object]) -> Reply:
        """Answer a question after those before it; `write` gets the answer's words as they come.

        Ctrl-C ends the answer; what was written of it counts as said. Where the conversation and an answer
        would exceed the model's positions, its oldest turns are forgotten.

        Raises:
            ValueError: the question alone is too long for the model.
        """
        import torch

        ids, forgotten = self._fitting(question, sampling.max_new_tokens)
        limit = min(sampling.max_new_tokens, self.longest - len(ids))
        words = _words(self.tokenizer, write)
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            drawn["top_k"] = 0  # else transformers looks at the 50 likeliest tokens only
            torch.manual_seed(sampling.seed)
        prompt = torch.tensor([ids], device=self.model.device)
        finish: Literal["stop", "length", "interrupted"] = "length"
        start = time.perf_counter()
        try:
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=words, max_new_tokens=limit, **drawn
            )
            if int(out[0, -1]) in self.stops:
                finish = "stop"
        except KeyboardInterrupt:
            words.end()
            finish = "interrupted"
        seconds = time.perf_counter() - start
        if words.text or finish != "interrupted":
            self.turns.append((question, words.text))
        return Reply(words.text, words.tokens, seconds, finish, forgotten)

    def _fitting(self, question: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Return the prompt's ids, and how many old turns were forgotten to leave room for an answer."""
        room = min(max_new_tokens, self.longest // 2)
        turns, before = self.turns, len(self.turns)
        ids = self._rendered(turns, question)
        while turns and len(ids) + room > self.longest:
            turns = turns[1:]
            ids = self._rendered(turns, question)
        if len(ids) >= self.longest:
            raise ValueError(
                f"question: found {len(ids)} tokens, expected fewer than {self.longest}, the model's"
                " positions; ask a shorter one"
            )
        self.turns = turns
        return ids, before - len(turns)

    def _rendered(self, turns: list[tuple[str, str]], question: str) -> list[int]:
        messages = []
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _words(tokenizer: Tokenizer, write: Callable[[str], object]) -> Any:
    """Return a streamer for `generate` that hands on whole words; it keeps `text` and counts `tokens`."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        text, blanks, tokens = "", "", 0

        def put(self, value: Any) -> None:
            self.tokens += not self.next_tokens_are_prompt
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Hand on all but the blanks at either end."""
            text = self.blanks + text if self.text else text.lstrip()
            word = text.rstrip()
            self.blanks = text[len(word) :]
            self.text += word
            if word:
                write(word)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)

"""What every engine shares: how tokens are chosen, what an answer is, what an engine does."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest, then top_p and seed have no effect."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True  # False always generates max_new_tokens, for measuring speed


@dataclass(frozen=True)
class Answer:
    """What a model said, without special tokens and outer blanks.

    `tokens` counts what was generated, the end of sequence included; `prompt_tokens` what was read.
    `finish_reason` is "length" for an answer cut at the token limit, "refused" where the engine took the
    prompt but would not answer it (too long for the model, or against a server's rules).
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    prompt_tokens: int = 0


def seed_of(prompt: str, seed: int) -> int:
    """Return the seed of one prompt's draws, 0 to 2**63 - 1; it depends on nothing else in the run."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


class Engine(Protocol):
    """Prompts in, answers out.

    `teacher` is the model's name for people. `identity` holds what, beside prompt and sampling, determines
    an answer: the weights' digest or revision, quantization, dtype, engine and version. It is JSON, goes
    into the key under which an answer is stored, and is the same for every run that would answer the same.
    """

    teacher: str
    identity: dict[str, Any]

    def render(self, instruction: str, input_text: str, mode: Literal["system1", "system2"]) -> str:
        """Return the prompt as this engine takes it: rendered text, or the messages as JSON."""

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield the place of each prompt and its answer, as soon as it is ready, in any order.

        `prompts` is read a little ahead of the answers, never as a whole. Every prompt gets one answer.

        Raises:
            EngineGone: the engine is gone for good; what was yielded before stays true.
        """

    def close(self) -> None:
        """Let go of models, processes and connections; called once."""

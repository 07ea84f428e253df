"""What every engine shares: how tokens are chosen, what an answer is, what an engine does."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "refused"]


GREEDY_IGNORES = ("top_p", "seed", "top_k", "min_p")  # what says nothing at temperature 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest, then `GREEDY_IGNORES` have no effect.

    The penalty comes first, then the temperature, top_k, top_p of what that leaves, and min_p.

    Args:
        stop_at_eos: False always generates max_new_tokens, for measuring speed.
        top_k: so many likeliest tokens are drawn from; 0 is no limit.
        min_p: tokens less likely than this share of the likeliest one's probability are not drawn.
        repetition_penalty: by which the scores of tokens that the prompt or the answer holds already are
            lowered, arXiv:1909.05858; 1 leaves them.
        stop: texts at which an answer ends, without them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def determining(self) -> dict[str, Any]:
        """Return, as JSON, what of it determines an answer, beside the token limit.

        Settings that came later are left out where they are off, so that keys from before them hold.
        """
        kept = asdict(self)
        del kept["max_new_tokens"]
        if not self.temperature:
            kept |= {field.name: field.default for field in fields(self) if field.name in GREEDY_IGNORES}
        kept |= {"temperature": float(self.temperature), "top_p": float(kept["top_p"])}
        for name in ("top_k", "min_p", "repetition_penalty", "stop"):
            if not kept[name] or (name == "repetition_penalty" and kept[name] == 1):
                del kept[name]
        return kept


@dataclass(frozen=True)
class Answer:
    """What a model said, without special tokens and outer blanks.

    `tokens` counts what was generated, the end of sequence included; `prompt_tokens` what was read.
    `finish_reason` is "length" for an answer cut at the token limit, "refused" where the engine took the
    prompt but would not answer it (too long for the model, or against a server's rules). `lasting` is False
    where this machine or this hour refused or cut, not the model: nobody else must get that answer.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    prompt_tokens: int = 0
    lasting: bool = True


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first of the stop texts in it, and whether there was one."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


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

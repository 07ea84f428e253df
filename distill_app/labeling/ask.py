"""From prompts to answers through the store: an engine is asked for what the store lacks, nothing else."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from distill_app.core.errors import EngineGone
from distill_app.core.stage import one_line
from distill_app.generation.answers import Answer, Engine, Sampling
from distill_app.labeling.progress import Progress
from distill_app.labeling.store import AnswerStore, Recipe

READ_AHEAD = 256  # prompts looked up at a time
CLAIM_AT_ONCE = 16  # few, so that two runs on one store share the work
POLL_SEC = 1.0  # between looks at what another run is still asking
SAY_WAITING_EVERY_SEC = 30.0

Item = TypeVar("Item")
Prompts = Callable[[], Iterable[str]]  # each call starts again with the first prompt


def fill_store(
    engine: Engine,
    prompts: Prompts,
    sampling: Sampling,
    store: AnswerStore,
    retry_to: int | None = None,
    total: int | None = None,
    label: str = "",
    log_path: str | Path | None = None,
) -> int:
    """Ask for every answer that the store lacks, store each as it comes, return how many were asked.

    Prompts are read as a stream, identical ones are asked once, and where nothing is lacking the engine is
    not asked to generate at all. What another run is asking is waited for; if that run dies it is asked here.

    Args:
        retry_to: an answer cut by the token limit is asked again with a doubled limit, up to this one.
        total: how many prompts there are, for the progress shown.
        label: what is being asked; empty shows nothing.
        log_path: a file that gets the progress too.

    Raises:
        EngineGone: the engine is gone for good; what was answered is stored, the message counts it.
    """
    asked = 0
    rungs = _rungs(sampling, retry_to)
    for number, rung in enumerate(rungs):
        wanted, wanted_total, title = prompts, total, label
        if number:
            wanted = _Cut(engine, prompts, rungs[:number], store)
            wanted_total = sum(1 for _ in wanted())
            if not wanted_total:
                break
            title = label and f"{label}, up to {rung.max_new_tokens} tokens"
        with Progress(title, wanted_total, log_path) as progress:
            asked += _Filling(engine, wanted, rung, store, progress).run()
    return asked


def read_answers(
    engine: Engine,
    prompts: Iterable[str],
    sampling: Sampling,
    store: AnswerStore,
    retry_to: int | None = None,
) -> Iterator[Answer]:
    """Yield the stored answer to each prompt, in their order; of a retried one, the last.

    Raises:
        ValueError: there is no answer to a prompt; `fill_store` was not called, or another run pruned it.
    """
    for _, answer in _answered(engine, prompts, _rungs(sampling, retry_to), store):
        yield answer


def _rungs(sampling: Sampling, retry_to: int | None) -> list[Sampling]:
    """Return the sampling with its limit, then with a doubled one, and so on up to the bound."""
    rungs = [sampling]
    while retry_to is not None and rungs[-1].max_new_tokens < retry_to:
        limit = min(2 * rungs[-1].max_new_tokens, retry_to)
        rungs.append(dataclasses.replace(sampling, max_new_tokens=limit))
    return rungs


def _answered(
    engine: Engine, prompts: Iterable[str], rungs: list[Sampling], store: AnswerStore
) -> Iterator[tuple[str, Answer]]:
    recipe = Recipe.of(engine, rungs[0])
    for chunk in _chunks(prompts, READ_AHEAD):
        keys = [recipe.key(prompt) for prompt in chunk]
        wanted = set(keys)
        found: dict[bytes, Answer] = {}
        for rung in rungs:
            new = store.answers(wanted, rung.max_new_tokens)
            if lost := wanted - set(new):
                raise ValueError(
                    f"{store.name}: {len(lost)} answers are gone, expected one a prompt; was it pruned?"
                    " run again to ask for them"
                )
            found |= new
            wanted = {key for key in wanted if new[key].finish_reason == "length"}
        yield from zip(chunk, (found[key] for key in keys), strict=True)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The prompts whose answer was cut under every limit so far."""

    engine: Engine
    prompts: Prompts
    rungs: list[Sampling]
    store: AnswerStore

    def __call__(self) -> Iterator[str]:
        for prompt, answer in _answered(self.engine, self.prompts(), self.rungs, self.store):
            if answer.finish_reason == "length":
                yield prompt


class _Filling:
    """One pass of an engine over prompts, under one token limit."""

    def __init__(
        self, engine: Engine, prompts: Prompts, sampling: Sampling, store: AnswerStore, progress: Progress
    ) -> None:
        self.engine, self.prompts, self.sampling = engine, prompts, sampling
        self.store, self.progress = store, progress
        self.recipe, self.limit = Recipe.of(engine, sampling), sampling.max_new_tokens
        self.in_flight: dict[int, bytes] = {}  # the key of each prompt that the engine has, by its place
        self.waiting: set[bytes] = set()  # what other runs are asking
        self.pull_error: BaseException | None = None

    def run(self) -> int:
        """Ask until the store has all; return how many were asked."""
        self.store.use(self.recipe)
        try:
            self._ask(only=None)
            while free := self._wait():
                self._ask(only=free)
        except BaseException as err:
            if not self.store.path:
                raise
            safe = f"{self.progress.asked} new answers are safe in {self.store.name}, run again to go on"
            if isinstance(err, EngineGone):
                raise EngineGone(f"{one_line(err)}; {safe}") from err
            self.progress.say(f"stopped; {safe}")
            raise
        finally:
            with contextlib.suppress(OSError, ValueError):  # the error that ends this run is told instead
                self.store.release_claims()
        return self.progress.asked

    def _ask(self, only: set[bytes] | None) -> None:
        prompts = self._pull(only)
        first = next(prompts, None)
        if first is None:
            return
        self.progress.start()
        answers = self.engine.generate(chain([first], prompts), self.sampling)
        try:
            for place, answer in answers:
                self.store.put(self.recipe, self.in_flight.pop(place), self.limit, answer)
                self.progress.add(1, asked=1, tokens=answer.tokens)
        except Exception as err:
            if self.pull_error and err is not self.pull_error:
                raise self.pull_error from err  # the engine's own thread met it and wrapped it
            raise
        finally:
            if isinstance(answers, Generator):
                answers.close()
        if self.in_flight:
            raise EngineGone(f"the engine gave no answer to {len(self.in_flight)} prompts")

    def _pull(self, only: set[bytes] | None) -> Iterator[str]:
        """Yield the prompts to ask, each claimed; of the given keys only, if any are given."""
        place = 0
        try:
            for chunk in _chunks(self.prompts(), READ_AHEAD):
                by_key = {self.recipe.key(prompt): prompt for prompt in chunk}
                if only is not None:
                    by_key = {key: prompt for key, prompt in by_key.items() if key in only}
                    only.difference_update(by_key)  # counted once, however often the prompt comes again
                stored = self.store.answered(by_key, self.limit)
                settled = len(stored) if only is not None else len(chunk) - len(by_key) + len(stored)
                self.progress.add(settled)
                for keys in _chunks((key for key in by_key if key not in stored), CLAIM_AT_ONCE):
                    claimed = self.store.claim(keys, self.limit)
                    new_waiting = claimed.theirs - self.waiting
                    self.waiting |= new_waiting
                    # The rest are answered by now, or asked already for an earlier prompt of the same text.
                    self.progress.add(len(keys) - len(claimed.mine) - len(new_waiting))
                    for key in keys:
                        if key in claimed.mine:
                            self.in_flight[place] = key
                            place += 1
                            yield by_key[key]
        except Exception as err:
            self.pull_error = err
            raise

    def _wait(self) -> set[bytes]:
        """Wait for what other runs are asking; return what they left unasked, nothing when all is done."""
        said = -SAY_WAITING_EVERY_SEC
        while self.waiting:
            answered, held = self.store.look(self.waiting, self.limit)
            self.progress.add(len(answered))
            free, self.waiting = self.waiting - answered - held, held
            if free:
                return free
            if held and time.monotonic() - said > SAY_WAITING_EVERY_SEC:
                said = time.monotonic()
                who = ", ".join(self.store.holders())
                self.progress.say(f"waiting for {len(held)} answers that another run is asking ({who})")
            if held:
                time.sleep(POLL_SEC)
        return set()


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

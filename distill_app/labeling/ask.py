"""From prompts to answers through the store: an engine is asked for what the store lacks, nothing else."""

import dataclasses
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
TAKEN_AT_ONCE = 16  # few, so that two runs on one store share the work

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
    not asked to generate at all. What another run has set out to ask comes last, and is asked only if that
    run has not stored it by then.

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
        self.pull_error: BaseException | None = None

    def run(self) -> int:
        """Ask until the store has all; return how many were asked."""
        self.store.use(self.recipe)
        try:
            theirs: set[bytes] = set()
            self._ask(self._pull(theirs))
            if theirs:
                self._ask(self._pull_left(theirs))
        except BaseException as err:
            if not self.store.path:
                raise
            safe = f"{self.progress.asked} new answers are safe in {self.store.name}, run again to go on"
            if isinstance(err, EngineGone):
                raise EngineGone(f"{one_line(err)}; {safe}") from err
            self.progress.say(f"stopped; {safe}")
            raise
        return self.progress.asked

    def _ask(self, prompts: Iterator[tuple[bytes, str]]) -> None:
        pulled = self._noting(prompts)
        first = next(pulled, None)
        if first is None:
            return
        self.progress.start()
        answers = self.engine.generate(chain([first], pulled), self.sampling)
        try:
            for place, answer in answers:
                self.store.put(self.recipe, self.in_flight[place], self.limit, answer)
                del self.in_flight[place]  # not before it is stored, else it would be asked again
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

    def _noting(self, prompts: Iterator[tuple[bytes, str]]) -> Iterator[str]:
        try:
            for place, (key, prompt) in enumerate(prompts):
                self.in_flight[place] = key
                yield prompt
        except Exception as err:
            self.pull_error = err
            raise

    def _pull(self, theirs: set[bytes]) -> Iterator[tuple[bytes, str]]:
        """Yield the prompts to ask with their keys; add to `theirs` what another run has set out to ask."""
        for chunk in _chunks(self.prompts(), READ_AHEAD):
            by_key = {self.recipe.key(prompt): prompt for prompt in chunk}
            new = by_key.keys() - theirs - set(self.in_flight.copy().values())
            lacking = new - self.store.answers(new, self.limit).keys()
            self.progress.add(len(chunk) - len(lacking))
            for keys in _chunks((key for key in by_key if key in lacking), TAKEN_AT_ONCE):
                mine, others = self.store.take(keys, self.limit)
                theirs |= others
                self.progress.add(len(keys) - len(mine) - len(others))
                yield from ((key, by_key[key]) for key in keys if key in mine)

    def _pull_left(self, theirs: set[bytes]) -> Iterator[tuple[bytes, str]]:
        """Yield what other runs set out to ask and have not answered by now."""
        for chunk in _chunks(self.prompts(), READ_AHEAD):
            by_key = {key: prompt for prompt in chunk if (key := self.recipe.key(prompt)) in theirs}
            theirs -= by_key.keys()  # asked once, however often the prompt comes again
            for keys in _chunks(by_key, TAKEN_AT_ONCE):
                answered = self.store.answers(keys, self.limit)
                self.progress.add(len(answered))
                yield from ((key, by_key[key]) for key in keys if key not in answered)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

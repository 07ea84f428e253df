"""What each of several answers to a prompt is worth: to a judge, or by the teacher's own probabilities."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, tee

from distill_app.core.models import Model, Tokenizer, load_teacher
from distill_app.generation.answers import Answer, Engine
from distill_app.generation.memory import release_memory
from distill_app.labeling.choosing import whole_answers
from distill_app.labeling.judge import Outcome, Pair, ask_judge, open_judge, read_verdicts
from distill_app.labeling.likelihood import Reading, answer_nats
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore

POINTS: dict[Outcome, float] = {"won": 1.0, "tied": 0.5, "unread": 0.5, "lost": 0.0}


@dataclass(frozen=True)
class Case:
    """A prompt in words and as the teacher's engine takes it, and the answers to it."""

    request: str
    prompt: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Scores:
    """The score of each whole answer by its place, and how many of a judge's verdicts could (not) be read."""

    by_place: dict[int, float] = field(default_factory=dict)
    read: int = 0
    unread: int = 0


class Judging:
    """Each answer against each other one before a judge, in both orders.

    An answer gets a point for each order in which it wins and half a point for a tie or a reply that cannot
    be read. n different answers take n (n - 1) replies, kept in the store like any other.

    Args:
        judge: may be the teacher itself.
    """

    def __init__(self, teacher: Engine, judge: Engine, store: AnswerStore, max_new_tokens: int) -> None:
        self.teacher, self.judge, self.store, self.max_new_tokens = teacher, judge, store, max_new_tokens

    def prepare(self, cases: Callable[[], Iterable[Case]], log_path: str) -> None:
        """Ask the judge for what the store lacks; another model takes the teacher's place in memory."""
        if self.judge is not self.teacher:
            self.teacher.close()
        title = f"label, judged by {self.judge.teacher}"
        ask_judge(self.judge, lambda: _pairs(cases()), self.store, self.max_new_tokens, title, log_path)

    def scores(self, cases: Iterable[Case]) -> Iterator[Scores]:
        """Yield the points of each case's answers, from the stored replies."""
        cases, judged = tee(cases)
        verdicts = read_verdicts(self.judge, _pairs(judged), self.store, self.max_new_tokens)
        for case in cases:
            texts = _different(case.answers)
            points, seen = dict.fromkeys(texts, 0.0), dict.fromkeys(POINTS, 0)
            for one, other in combinations(texts, 2):
                for outcome in next(verdicts):
                    seen[outcome] += 1
                    points[one] += POINTS[outcome]
                    points[other] += 1 - POINTS[outcome]
            by_place = {place: points[text] for text, places in texts.items() for place in places}
            yield Scores(by_place, sum(seen.values()) - seen["unread"], seen["unread"])

    def close(self) -> None:
        if self.judge is not self.teacher:
            self.judge.close()


class Likelihood:
    """The teacher's mean log-probability a token of each answer, in nats, read by its weights in process.

    Each prompt's answers are read in passes of their own, so the choice among them does not depend on the
    other prompts. Nothing is kept: a pass that reads costs a small part of what writing the answer did.
    """

    def __init__(self, teacher: Engine, params: LabelParams) -> None:
        self.teacher, self.params = teacher, params

    @cached_property
    def _loaded(self) -> tuple[Model, Tokenizer]:
        release_memory()
        return load_teacher(self.params.teacher, self.params.quantization, self.params.revision)

    def prepare(self, cases: Callable[[], Iterable[Case]], log_path: str) -> None:
        """Take the place of the engine, which has the same weights in memory."""
        self.teacher.close()

    def scores(self, cases: Iterable[Case]) -> Iterator[Scores]:
        """Yield the mean log-probabilities of each case's answers; one too long for the model has none."""
        for case in cases:
            texts = _different(case.answers)
            if len(texts) < 2:
                yield Scores({place: 0.0 for places in texts.values() for place in places})
                continue
            # A text of `stop` that ended an answer is not in it, so whether the sequence ended is not known
            ended = [not self.params.stop] * len(texts)
            read = answer_nats(Reading(*self._loaded, [case.prompt] * len(texts), list(texts), ended))
            yield Scores(
                {
                    place: round(-nats["nats"] / nats["tokens"], 4)
                    for nats, places in zip(read, texts.values(), strict=True)
                    if nats
                    for place in places
                }
            )

    def close(self) -> None:
        self.__dict__.pop("_loaded", None)


class Unscored:
    """No scores, for choosers that read the answers alone."""

    def prepare(self, cases: Callable[[], Iterable[Case]], log_path: str) -> None:
        """Nothing is needed."""

    def scores(self, cases: Iterable[Case]) -> Iterator[Scores]:
        return (Scores() for _ in cases)

    def close(self) -> None:
        """Nothing is held."""


Scorer = Judging | Likelihood | Unscored


def open_scorer(teacher: Engine, store: AnswerStore, params: LabelParams) -> Scorer:
    """Return what scores the answers for `label.choose`; no weights are loaded yet.

    Raises:
        ValueError: the judge cannot be had, or a server is to tell likelihoods.
    """
    if params.samples == 1:
        return Unscored()
    if params.choose == "judge":
        return Judging(teacher, _open_judge(teacher, params), store, params.judge_max_new_tokens)
    if params.choose == "likelihood":
        if params.engine == "openai":
            raise ValueError(
                "label.choose: found likelihood with label.engine: openai, expected another chooser, for a"
                " server keeps its weights; take majority, judge or reference, or engine transformers or vllm"
            )
        return Likelihood(teacher, params)
    return Unscored()


def _open_judge(teacher: Engine, params: LabelParams) -> Engine:
    if params.judge is None:
        return teacher
    engine = params.judge_engine or params.engine
    where = (params.judge_revision, engine, params.judge_base_url)
    return open_judge("label", params.judge, *where, params)


def _different(answers: Sequence[Answer]) -> dict[str, list[int]]:
    """Return the places of the whole answers by their text, in order."""
    texts: dict[str, list[int]] = {}
    for place in whole_answers(answers):
        texts.setdefault(answers[place].text, []).append(place)
    return texts


def _pairs(cases: Iterable[Case]) -> Iterator[Pair]:
    for case in cases:
        for one, other in combinations(_different(case.answers), 2):
            yield Pair(case.request, other, one)

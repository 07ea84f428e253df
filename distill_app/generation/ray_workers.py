"""One engine on many workers: Ray actors on this machine's processors, or on the nodes of a cluster.

Every worker is a process with a copy of the model. This process reads the prompts, hands them out a few at
a time and gets every answer back as it is finished; a worker that dies costs the answers it was generating.

A worker on another machine needs the same Ray, Python and project installed, and the teacher under the same
name: a Hub model, or a folder at the same path.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import distributions
from itertools import islice
from typing import Any, Literal

from distill_app.core.errors import EngineGone
from distill_app.core.stage import one_line
from distill_app.generation.answers import Answer, Engine, Sampling

CHUNK = 4  # prompts handed out at a time; a worker has at most two chunks that its engine has not asked for
MOST_DEATHS = 3  # of workers that were asked the same prompt; then it is the prompt that kills them
SAY_WAITING_EVERY_SEC = 60.0
SAME_EVERYWHERE = ("distill-app", "torch", "transformers")  # packages whose versions an answer depends on

# Ends what Ray leaves behind. The cluster's processes die with this one, but two of Ray's agents only after
# 60 s, in which they try to tell the dead head, and what an engine has started itself is nobody's child.
# Standard input closes when the process that starts this ends, however it ends.
SWEEP = """
import contextlib, psutil, select, sys
seen = set()
for pid in sys.argv[1:]:
    with contextlib.suppress(psutil.Error):
        seen.add(psutil.Process(int(pid)))
while not select.select([sys.stdin], [], [], 1.0)[0]:
    for process in list(seen):
        with contextlib.suppress(psutil.Error):
            seen.update(process.children(recursive=True))
    seen = {process for process in seen if process.is_running()}
for process in seen:
    with contextlib.suppress(psutil.Error):
        process.kill()
"""

Item = tuple[int, str]  # a prompt's place among those to be asked, and the prompt


class RayWorkers:
    """An engine that asks many copies of another one; Ray starts at the first prompt.

    The answers are those of one worker, in another order. A process that is connected to Ray already stays
    on its cluster, whatever `address` says.

    Args:
        make_engine: builds the engine, here for its name and its prompts, and once in every worker. Goes to
            the workers pickled, so take a function of a module, or `functools.partial` of one.
        workers: copies of the model, at least 1.
        address: `HOST:PORT` of a running cluster, or "auto" on one of its nodes; None starts one on this
            machine, which ends with this process, killed or not.
        gpus_per_worker: GPUs of one copy where the cluster has any, else a worker takes its share of a
            node's processors. For vLLM it is `tensor_parallel_size`: the GPUs of one worker are on one node.

    Attributes:
        asked_again: how many prompts went to another worker because theirs had died.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a number below 1, or an address of Ray Client, which cannot stream answers.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        workers: int,
        address: str | None = None,
        gpus_per_worker: int = 1,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ImportError(
                'ray: not installed, more than one labelling worker needs it; pip install "ray==2.60.0"'
            )
        if workers < 1 or gpus_per_worker < 1:
            raise ValueError(
                f"workers, gpus_per_worker: found {workers}, {gpus_per_worker}, expected 1 or more"
            )
        if address is not None and "://" in address:
            raise ValueError(
                f"{address}: an address of Ray Client, which cannot stream answers; run on a node of the"
                ' cluster with address "auto", or give the head\'s HOST:PORT, usually port 6379'
            )
        self._make_engine, self._count, self._address = make_engine, workers, address
        self._gpus_per_worker = gpus_per_worker
        self._engine = make_engine()
        self.teacher, self.identity = self._engine.teacher, self._engine.identity
        self.asked_again = 0
        self._workers: list[_Worker] = []
        self._connection: contextlib.ExitStack | None = None

    def render(self, instruction: str, input_text: str, mode: Literal["system1", "system2"]) -> str:
        return self._engine.render(instruction, input_text, mode)

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield the place of each prompt and its answer, as soon as it is ready, in any order.

        Raises:
            EngineGone: the cluster cannot be joined, or this machine has too few GPUs; a worker's
                installation differs from this one; the engine raised an error, which is repeated; prompts
                that killed three workers.
        """
        backlog = _Backlog(prompts)
        if not (first := backlog.take()):
            return
        backlog.put_back(first)
        self._connection = self._connection or _join_cluster(self._address)
        try:
            yield from self._ask(backlog, sampling)
        except BaseException:  # an interrupt and a caller who stops reading too: workers must not go on
            self._end_workers()
            raise

    def close(self) -> None:
        self._engine.close()
        self._end_workers()
        if self._connection:
            self._connection.close()
            self._connection = None

    def _ask(self, backlog: "_Backlog", sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        import ray

        deaths: Counter[int | None] = Counter()  # by a prompt's place; None is dying at the start
        while len(self._workers) < self._count:
            self._workers.append(self._new_worker())
        while True:
            for worker in self._workers:
                worker.hand_out(backlog, sampling)
            if not backlog.waiting and not any(worker.answering for worker in self._workers):
                return
            ready, _ = ray.wait(
                [ref for worker in self._workers for ref in worker.refs()], timeout=SAY_WAITING_EVERY_SEC
            )
            if not ready and not any(worker.started for worker in self._workers):
                _say(
                    f"waiting for the cluster to start {self._count} workers of {self._needs()} each;"
                    f" it has {ray.cluster_resources()}"
                )
            for number, worker in enumerate(self._workers):
                try:
                    for item in worker.collect(ready, self.identity):
                        deaths[None] = 0
                        yield item
                except ray.exceptions.RayTaskError as err:
                    where = f"{worker.host}: " if self._address and worker.started else ""
                    raise EngineGone(where + one_line(err.cause)) from err
                except ray.exceptions.RayError as err:
                    self._workers[number] = self._replace(worker, backlog, deaths, err)

    def _replace(
        self, dead: "_Worker", backlog: "_Backlog", deaths: "Counter[int | None]", err: Exception
    ) -> "_Worker":
        dead.kill()
        lost = sorted(dead.asked.items())
        for place in dead.asked or [None]:
            deaths[place] += 1
        reason = _reason(err)
        worst = max(lost, key=lambda item: deaths[item[0]], default=(None, ""))
        if deaths[worst[0]] >= MOST_DEATHS:
            what = f"the prompts in flight, the first {lost[0][1][:60]!r}" if lost else "its start"
            raise EngineGone(
                f"{MOST_DEATHS} workers died, one after the other, of {what} (on {dead.host}: {reason}); if"
                " memory ran out, lower label.batch_size or label.engine_workers"
            ) from err
        _say(f"a worker on {dead.host} died ({reason}); {len(lost)} prompts are asked again")
        backlog.put_back(lost)
        self.asked_again += len(lost)
        return self._new_worker()

    def _new_worker(self) -> "_Worker":
        import ray
        from ray import cloudpickle

        options: Any = {"concurrency_groups": {"engine": 1, "feed": 1}, **self._needs()}
        actor = ray.remote(**options)(_actor_class()).remote()
        make_engine = cloudpickle.dumps(self._make_engine)
        return _Worker(actor, actor.start.remote(make_engine, os.getcwd(), SAME_EVERYWHERE))

    def _needs(self) -> dict[str, float]:
        """Return the processors and GPUs of one worker; Ray gives it as many OpenMP threads."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
            if self._address is None and gpus < self._count * self._gpus_per_worker:
                raise EngineGone(
                    f"label.engine_workers: found {self._count} workers of {self._gpus_per_worker} GPUs,"
                    f" expected no more than the {gpus} GPUs here; lower it, or give a cluster's address"
                )
            return {"num_cpus": 1, "num_gpus": self._gpus_per_worker}
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        share: float = _share(cpus, self._count)
        if self._address is None:  # more workers than processors share them
            share = min(share, int(1e4 * sum(cpus) / self._count) / 1e4)
        return {"num_cpus": share, "num_gpus": 0}

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


class _Backlog:
    """The prompts to hand out: those of dead workers first, then the caller's, read when they are needed."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self._source = enumerate(prompts)
        self._again: deque[Item] = deque()
        self._ended = False

    @property
    def waiting(self) -> bool:
        """Whether there may be prompts left."""
        return bool(self._again) or not self._ended

    def take(self) -> list[Item]:
        """Return the next chunk; empty when there is no prompt left."""
        chunk = [self._again.popleft() for _ in range(min(CHUNK, len(self._again)))]
        new = list(islice(self._source, CHUNK - len(chunk)))
        self._ended = self._ended or len(chunk) + len(new) < CHUNK
        return chunk + new

    def put_back(self, items: list[Item]) -> None:
        self._again.extendleft(reversed(items))


@dataclass
class _Worker:
    """One actor, as this process sees it.

    `starting`, `answering` and `adding` are the calls under way: building the engine, the stream of answers,
    and the last chunk handed out, which returns when the one before it has been begun.
    """

    actor: Any
    starting: Any
    host: str = "a node"
    answering: Any = None
    adding: Any = None
    asked: dict[int, str] = field(default_factory=dict)  # the prompts without an answer, by place
    fed: bool = False  # it has been told that there are no more prompts

    @property
    def started(self) -> bool:
        return self.starting is None

    def refs(self) -> list[Any]:
        return [ref for ref in (self.starting, self.answering, self.adding) if ref is not None]

    def hand_out(self, backlog: _Backlog, sampling: Sampling) -> None:
        """Give the next chunk where there is room for one."""
        if not self.started or self.adding is not None or (self.answering and self.fed):
            return
        chunk = backlog.take()
        if self.answering is None:
            if not chunk:
                return
            self.answering, self.fed = self.actor.answers.remote(sampling), False
        self.asked.update(chunk)
        self.adding, self.fed = self.actor.add.remote(chunk), not chunk

    def collect(self, ready: list[Any], identity: dict[str, Any]) -> Iterator[tuple[int, Answer]]:
        """Yield the answers that are there.

        Raises:
            EngineGone: the worker's engine or installation is not the one here.
            ray.exceptions.RayError: the worker is dead, or its engine has raised an error (RayTaskError).
        """
        import ray

        if self.starting in ready:
            self.host, found, versions = ray.get(self.starting)
            _check_same(self.host, {**identity, **_versions()}, {**found, **versions})
            self.starting = None
        # Before the other call's result: of a worker that has died, these are the answers that came through
        while self.answering is not None and (self.answering in ready or self.answering.next_ready()):
            try:
                place, answer = ray.get(next(self.answering))
            except StopIteration:
                self.answering = None
                break
            del self.asked[place]
            yield place, answer
            ready = []
        if self.adding is not None and ray.wait([self.adding], timeout=0)[0]:
            ray.get(self.adding)
            self.adding = None

    def kill(self) -> None:
        import ray

        if ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self.actor)


def _actor_class() -> Any:
    """Return the class of the actors.

    It is made here, and names nothing of this module, so that Ray sends it whole: then a node without the
    project starts its worker all the same, which can say what is missing.
    """
    import ray

    class LabelWorker:
        def __init__(self) -> None:
            import queue

            self.chunks: Any = queue.Queue(maxsize=1)

        @ray.method(concurrency_group="engine")
        def start(self, make_engine: bytes, folder: str, packages: tuple[str, ...]) -> tuple[Any, Any, Any]:
            import importlib.metadata
            import os
            import socket

            from ray import cloudpickle

            host = socket.gethostname()
            if os.path.isdir(folder):  # a cluster's workers start elsewhere, and paths may be relative
                os.chdir(folder)
            try:
                make = cloudpickle.loads(make_engine)
            except ImportError as err:
                raise RuntimeError(
                    f"{host}: the worker cannot import what it needs ({err}); install the project there, the"
                    " same versions as here, or submit the run with a runtime_env that brings it"
                ) from None
            self.engine = make()
            found = {name: importlib.metadata.distributions(name=name) for name in packages}
            versions = {name: next((d.version for d in each), None) for name, each in found.items()}
            return host, self.engine.identity, versions

        @ray.method(concurrency_group="engine")
        def answers(self, sampling: Any) -> Any:
            places: dict[int, int] = {}
            feed = self._feed(places)
            for number, answer in self.engine.generate(feed, sampling):
                yield places.pop(number), answer
            if places or next(feed, None) is not None:
                raise RuntimeError(f"{self.engine.teacher}: the engine left a prompt without an answer")

        def _feed(self, places: dict[int, int]) -> Any:
            count = 0
            while chunk := self.chunks.get():
                for place, prompt in chunk:
                    places[count] = place
                    count += 1
                    yield prompt

        @ray.method(concurrency_group="feed")
        def add(self, chunk: list[tuple[int, str]]) -> None:
            self.chunks.put(chunk)

    return LabelWorker


def _join_cluster(address: str | None) -> contextlib.ExitStack:
    """Connect to Ray, or start it on this machine; closing what is returned undoes it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray, started by `uv run`, packs and uploads the working folder with all its models
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")  # what a dead worker had started dies too
    import ray

    at_end = contextlib.ExitStack()
    if ray.is_initialized():
        return at_end
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, OSError, ValueError) as err:
        raise EngineGone(
            f"{address or 'ray'}: cannot join the Ray cluster ({one_line(err)}); check the address, and that"
            f" its nodes run Ray {ray.__version__} and Python {sys.version.split()[0]}"
        ) from err
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has signals, and Ray took this one
            signal.signal(signal.SIGTERM, on_sigterm)
    if address is None:
        at_end.callback(_start_sweeper().communicate)
    at_end.callback(ray.shutdown, wait_for_processes=True)  # callbacks run last to first
    return at_end


def _knock(address: str | None) -> None:
    """Fail in seconds where nobody listens; Ray itself tries for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _start_sweeper() -> "subprocess.Popen[bytes]":
    import psutil

    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    agents = [child for raylet in raylets for child in raylet.children()]
    pids = [str(process.pid) for process in raylets + agents]
    # A session of its own, so that Ctrl-C does not end it before the others
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, *pids], stdin=subprocess.PIPE, start_new_session=True
    )


def _share(cpus: list[int], workers: int) -> int:
    """Return the most processors a worker can have so that all workers find room on the nodes; at least 1."""
    fitting = (n for n in range(max(cpus, default=1), 1, -1) if sum(c // n for c in cpus) >= workers)
    return next(fitting, 1)


def _versions() -> dict[str, str | None]:
    return {name: next((d.version for d in distributions(name=name)), None) for name in SAME_EVERYWHERE}


def _check_same(host: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    different = [key for key in here if _public(here[key]) != _public(there.get(key))]
    if different:
        key = different[0]
        raise EngineGone(
            f"{host}: the worker has {key} {there.get(key)}, expected {here[key]} as on"
            f" {socket.gethostname()}, or its answers are others; install the same there"
        )


def _public(value: Any) -> Any:
    """Return a version without its build: a head without a GPU has torch 2.13.0+cpu, its nodes +cu130."""
    return value.partition("+")[0] if isinstance(value, str) else value


def _reason(err: Exception) -> str:
    """Return the one sentence of Ray's paragraphs that says how a worker ended."""
    text = one_line(err)
    for start in ("Worker exit detail: ", "The actor is dead because "):
        if start in text:
            text = text.split(start, 1)[1]
            break
    return text.split(". ", 1)[0][:200]


def _say(text: str) -> None:
    print(f"label: {text}", file=sys.stderr, flush=True)

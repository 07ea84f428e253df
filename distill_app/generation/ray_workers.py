"""One engine on many workers: Ray Data over this machine's processors, or over the nodes of a cluster.

The prompts are a dataset of chunks, mapped by a pool of actors that each hold a copy of the model; Ray Data
starts, grows and replaces them, and repeats what a lost one was answering. `_Feed` hands it the chunks and
counts how often each was begun: a chunk whose workers keep dying is asked prompt by prompt, and the prompt
that kills them is refused.

A worker on another machine needs the same Ray, Python and project installed, and the teacher under the same
name: a Hub model, or a folder at the same path.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from itertools import chain, count, islice
from typing import Any, Literal

from distill_app.core.errors import EngineGone
from distill_app.core.stage import one_line
from distill_app.generation.answers import Answer, Engine, Sampling

CALLS = 4  # chunks that a worker answers at a time, so that the next one is there when rows are free
MOST_STARTS = 3  # of a worker without one answer
MOST_REFUSED = 4  # prompts that ended their workers, before any was answered
MOST_ALONE = 2  # deaths of the workers that were asked this prompt and no other
SAME_EVERYWHERE = ("distill-app", "torch", "transformers")  # packages whose versions an answer depends on

Chunks = Iterator[tuple[int, list[str] | None]]  # the prompts to be asked; None is the end

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


class RayWorkers:
    """An engine that asks many copies of another one; Ray starts at the first prompt.

    The answers are those of one worker, in another order. A prompt that kills its workers is refused. A
    process that is connected to Ray already stays on its cluster, whatever `address` says.

    Args:
        make_engine: builds the engine, here for its name and its prompts, and once in every worker. Goes to
            the workers pickled, so take a function of a module, or `functools.partial` of one.
        workers: copies of the model at most, at least 1; the pool grows to them as the cluster does.
        address: `HOST:PORT` of a running cluster, or "auto" on one of its nodes; None starts one on this
            machine, which ends with this process, killed or not.
        gpus_per_worker: GPUs of one copy on a cluster that has or can add any, else a worker takes its share
            of a node's processors. For vLLM it is `tensor_parallel_size`, all on one node.
        needs_gpu: the engine cannot do without: wait for GPUs, also where no node has one yet.
        chunk: prompts handed out, and answers handed back, at a time; half the engine's batch is a good size.

    Attributes:
        asked_again: how many prompts were asked again because their worker had died.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a number below 1, or an address of Ray Client, which Ray Data cannot use.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        workers: int,
        address: str | None = None,
        gpus_per_worker: int = 1,
        needs_gpu: bool = False,
        chunk: int = 4,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ImportError(
                'ray: not installed, more than one labelling worker needs it; pip install "ray==2.60.0"'
            )
        if min(workers, gpus_per_worker, chunk) < 1:
            raise ValueError(
                f"workers, gpus_per_worker, chunk: found {workers}, {gpus_per_worker}, {chunk}, expected 1"
                " or more"
            )
        if address is not None and "://" in address:
            raise ValueError(
                f"{address}: an address of Ray Client, which Ray Data cannot use; run on a node of the"
                ' cluster with address "auto", or give the head\'s HOST:PORT, usually port 6379'
            )
        self._make_engine, self._count, self._address = make_engine, workers, address
        self._gpus_per_worker, self._needs_gpu, self._chunk = gpus_per_worker, needs_gpu, chunk
        self._engine = make_engine()
        self.teacher, self.identity = self._engine.teacher, self._engine.identity
        self.asked_again = 0
        self._connection: contextlib.ExitStack | None = None

    def render(self, instruction: str, input_text: str, mode: Literal["system1", "system2"]) -> str:
        return self._engine.render(instruction, input_text, mode)

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield the place of each prompt and its answer, as soon as its chunk is answered, in any order.

        Raises:
            EngineGone: the cluster cannot be joined, or this machine has too few GPUs; a worker's
                installation differs from this one; the engine cannot start, which is told in its words.
        """
        iterator = iter(prompts)
        lists: Iterator[list[str]] = iter(lambda: list(islice(iterator, self._chunk)), [])
        chunks: Chunks = enumerate(chain(lists, [None]))
        first = next(chunks)
        if first[1] is None:
            return
        self._connection = self._connection or _join_cluster(self._address)
        import ray

        options: dict[str, Any] = {"max_concurrency": 10_000, **_here()}  # every worker has calls waiting
        feed: Any = ray.remote(**options)(_Feed).remote()
        chunks, under_way = chain([first], chunks), set[int]()
        outcomes: Counter[bool] = Counter()  # whether a prompt ended its workers
        try:
            self._hand_out(feed, chunks, under_way)
            for rows in self._dataset(feed, sampling).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for index, deaths, answers in map(pickle.loads, rows["answers"].to_pylist()):
                    if isinstance(answers, str):
                        raise EngineGone(answers)
                    under_way.remove(index)
                    feed.end.remote(index)
                    if deaths:
                        self.asked_again += len(answers)
                        _say(f"{deaths} workers died; {len(answers)} prompts were asked again")
                    outcomes.update(
                        answer.finish_reason == "refused" and not answer.lasting for answer in answers
                    )
                    if not outcomes[False] and outcomes[True] >= MOST_REFUSED:
                        raise EngineGone(
                            f"{outcomes[True]} prompts ended their workers and none was answered;"
                            f" {answers[-1].text}"
                        )
                    yield from enumerate(answers, index * self._chunk)
                    self._hand_out(feed, chunks, under_way)
        except ray.exceptions.RayError as err:
            raise EngineGone(f"the Ray cluster cannot go on: {one_line(err)}") from err
        finally:
            ray.kill(feed)  # every worker ends with it, also where the caller stops reading
        if under_way:
            raise EngineGone(f"{self.teacher}: the workers left {len(under_way)} chunks without an answer")

    def close(self) -> None:
        self._engine.close()
        if self._connection:
            self._connection.close()
            self._connection = None

    def _hand_out(self, feed: Any, chunks: Chunks, under_way: set[int]) -> None:
        """Read so many prompts ahead that every worker has a full hand and the pool a reason to grow."""
        for index, chunk in islice(chunks, self._count * 2 * CALLS - len(under_way)):
            if chunk is not None:
                under_way.add(index)
            feed.put.remote(index, chunk and pickle.dumps(chunk))

    def _dataset(self, feed: Any, sampling: Sampling) -> Any:
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a row is a block: nothing waits for company
        context.execution_no_progress_timeout_s = -1  # nodes and long answers take their time
        context.op_resource_reservation_enabled = False  # `_hand_out` bounds what is under way
        made = ray.cloudpickle.dumps(self._make_engine), self.identity | _versions()
        with ray.data.DataContext.current(context):
            return (
                ray.data.from_items([0])
                .map_batches(partial(_read, feed=feed), batch_size=None, **_here())
                .map_batches(
                    _Worker,
                    fn_constructor_args=(*made, sampling, feed, os.getcwd()),
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(
                        min_size=1,
                        max_size=self._count,
                        initial_size=self._count,
                        max_concurrent_calls_per_actor=CALLS,
                        enable_true_multi_threading=True,
                    ),
                    **self._needs(),
                )
            )

    def _needs(self) -> dict[str, Any]:
        """Return the processors and GPUs of one worker; Ray gives it as many OpenMP threads."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        addable = ray._private.state.state.get_max_resources_from_cluster_config() or {}
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if gpus or addable.get("GPU") or self._needs_gpu:
            if self._address is None and gpus < self._count * self._gpus_per_worker:
                raise EngineGone(
                    f"label.engine_workers: found {self._count} workers of {self._gpus_per_worker} GPUs,"
                    f" expected no more than the {gpus} GPUs here; lower it, or give a cluster's address"
                )
            if not gpus:
                _say(f"no node has a GPU yet; waiting for workers of {self._gpus_per_worker} GPUs each")
            return {"num_cpus": 1, "num_gpus": self._gpus_per_worker}
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if not any(cpus):
            _say("no node has a processor for workers yet; waiting for the cluster to grow")
        share: float = _share(cpus, self._count)
        if self._address is None:  # more workers than processors share them
            share = min(share, int(1e4 * sum(cpus) / self._count) / 1e4)
        return {"num_cpus": share, "num_gpus": 0}


class _Feed:
    """An actor with the chunks under way, and how often each thing was begun that has not ended yet.

    A chunk stays until it is answered, so a reader that starts again hands out the same.
    """

    def __init__(self) -> None:
        self.chunks: dict[int, bytes] = {}
        self.begun: Counter[Any] = Counter()
        self.reasons: dict[Any, str] = {}
        self.read = 0
        self.total: int | None = None
        self.news = asyncio.Condition()

    async def put(self, index: int, chunk: bytes | None) -> None:
        """Add a chunk; None says that there are no more."""
        async with self.news:
            if chunk is None:
                self.total = index
            else:
                self.chunks[index] = chunk
            self.news.notify_all()

    async def get(self, index: int) -> bytes | None:
        """Wait for a chunk; return nothing in place of an answered one, None after the last."""
        async with self.news:
            await self.news.wait_for(lambda: index in self.chunks or index < self.read or index == self.total)
            self.read = max(self.read, index + 1)
            return None if index == self.total else self.chunks.get(index, b"")

    async def begin(self, key: Any) -> tuple[int, str]:
        """Return how often it was begun before without an end, and what was noted of that."""
        self.begun[key] += 1
        return self.begun[key] - 1, self.reasons.get(key, "it ended without a word, as by lack of memory")

    async def note(self, key: Any, reason: str) -> None:
        self.reasons[key] = reason

    async def end(self, key: Any) -> None:
        for kept in (self.begun, self.reasons, self.chunks):
            kept.pop(key, None)

    async def outlive(self) -> None:
        await asyncio.Event().wait()


def _read(_: Any, *, feed: Any) -> Iterator[Any]:
    """Yield a row a chunk, as the feed gets them."""
    import pyarrow
    import ray

    for index in count():
        chunk = ray.get(feed.get.remote(index))
        if chunk is None:
            return
        yield pyarrow.table({"index": [index], "chunk": [chunk]})


@dataclass
class _Job:
    """Prompts that a worker answers together; `answers` by their place, `done` holds them in order."""

    index: int
    prompts: list[str]
    deaths: int = 0  # of workers that were asked these before
    answers: dict[int, Answer] = field(default_factory=dict)
    done: "Future[list[Answer]]" = field(default_factory=Future)

    def take(self, number: int, answer: Answer) -> None:
        self.answers[number] = answer
        if len(self.answers) == len(self.prompts):
            self.done.set_result([self.answers[n] for n in range(len(self.prompts))])


class _Worker:
    """One copy of the engine, in an actor of the pool.

    A thread of its own asks the engine, as long as there are chunks as one stream of prompts. Chunks whose
    worker died are asked one at a time, and after that prompt by prompt.
    """

    def __init__(
        self, make_engine: bytes, expected: dict[str, Any], sampling: Sampling, feed: Any, folder: str
    ) -> None:
        import ray

        self.sampling, self.feed, self.error = sampling, feed, ""
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._end_with_feed, daemon=True).start()
        if os.path.isdir(folder):  # a cluster's workers start elsewhere, and paths may be relative
            os.chdir(folder)
        me, host = ray.get_runtime_context().get_actor_id(), socket.gethostname()
        starts, reason = ray.get(feed.begin.remote(me))
        try:
            if starts >= MOST_STARTS:
                raise EngineGone(f"the worker died {starts} times at its start; {reason}")
            self.engine: Engine = ray.cloudpickle.loads(make_engine)()
            _check_same(expected, self.engine.identity | _versions())
            hello = self.engine.render("Hello", "", "system1")  # loads the model
            list(self.engine.generate([hello], Sampling(1)))
        except ImportError as err:
            self.error = (
                f"{host}: the worker cannot import what it needs ({err}); install the project there, the same"
                " versions as here, or submit the run with a runtime_env that brings it"
            )
        except Exception as err:
            self.error = f"{host}: {one_line(err)}"
        ray.get(feed.end.remote(me))
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, row: Any) -> Any:
        import pyarrow
        import ray

        index, chunk = row["index"][0].as_py(), row["chunk"][0].as_py()
        if not chunk:  # answered before its reader started again; nobody waits for this
            return pyarrow.table({"answers": pyarrow.array([], pyarrow.binary())})
        if self.error:
            result: Any = (index, 0, self.error)
        else:
            job = _Job(index, pickle.loads(chunk), ray.get(self.feed.begin.remote(index))[0])
            self.jobs.put(job)
            result = (index, job.deaths, job.done.result())
        return pyarrow.table({"answers": [pickle.dumps(result)]})

    def _work(self) -> None:
        following: list[_Job] = []

        def fresh(job: _Job) -> Iterator[_Job]:
            """Yield this and the chunks that are there, up to one that is not to have company."""
            while True:
                yield job
                try:
                    job = self.jobs.get_nowait()
                except queue.Empty:
                    return
                if job.deaths:
                    following.append(job)
                    return

        while True:
            job = following.pop() if following else self.jobs.get()
            if job.deaths < 2:
                self._ask([job] if job.deaths else fresh(job))
                continue
            for number, prompt in enumerate(job.prompts):
                job.take(number, self._ask_alone((job.index, number), prompt))

    def _ask(self, jobs: Iterable[_Job], key: Any = None) -> None:
        """Ask; an engine that fails takes its worker with it, so that the next one starts afresh."""
        import ray

        asked: dict[int, tuple[_Job, int]] = {}

        def prompts() -> Iterator[str]:
            numbers = count()
            for job in jobs:
                for number, prompt in enumerate(job.prompts):
                    asked[next(numbers)] = job, number
                    yield prompt

        try:
            for place, answer in self.engine.generate(prompts(), self.sampling):
                job, number = asked.pop(place)
                job.take(number, answer)
            if asked:
                raise EngineGone(f"the engine left {len(asked)} prompts without an answer")
        except BaseException as err:
            ray.get(self.feed.note.remote(key, one_line(err)))
            os._exit(1)

    def _ask_alone(self, key: Any, prompt: str) -> Answer:
        import ray

        deaths, reason = ray.get(self.feed.begin.remote(key))
        if deaths >= MOST_ALONE:
            return Answer(f"its worker died {deaths} times: {reason}", 0, "refused", lasting=False)
        job = _Job(key[0], [prompt])
        self._ask([job], key)
        ray.get(self.feed.end.remote(key))
        return job.done.result()[0]

    def _end_with_feed(self) -> None:
        """Leave nothing running once nobody waits for the answers."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.feed.outlive.remote())
        os._exit(0)


def _here() -> dict[str, Any]:
    """Return Ray's options for what stays on this node: a lost one must not take the prompts with it."""
    import ray

    return {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


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


def _check_same(here: dict[str, Any], there: dict[str, Any]) -> None:
    for key in here:
        if _public(here[key]) != _public(there.get(key)):
            raise EngineGone(
                f"the worker has {key} {there.get(key)}, expected {here[key]}, or its answers are others;"
                " install the same on every machine"
            )


def _public(value: Any) -> Any:
    """Return a version without its build: a head without a GPU has torch 2.13.0+cpu, its nodes +cu130."""
    return value.partition("+")[0] if isinstance(value, str) else value


def _say(text: str) -> None:
    print(f"label: {text}", file=sys.stderr, flush=True)

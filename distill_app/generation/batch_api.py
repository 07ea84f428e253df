"""The batch API of hosted models: files of requests that are answered within a day, at a lower price.

Source: OpenAI's API reference, https://platform.openai.com/docs/api-reference/batch; others speak it too.

What was sent lies under WORK_DIR until its answers are stored: `NAME.jsonl` with the requests, `NAME.json`
with the ids of the uploaded file and of the batch. A run that starts again reads on from there. A request's
id is a hash of its body, so whatever asks for the same finds it in a batch that is already paid for.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from distill_app.core.errors import EngineGone
from distill_app.core.files import save_json
from distill_app.core.stage import one_line
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.endpoint import ROUNDS, Endpoint, Unusable, as_json, pause_sec, require_end

WORK_DIR = "work/batches"
MAX_REQUESTS = 50_000  # of a file, and the next line its bytes: OpenAI's limits
MAX_BYTES = 200_000_000
AT_ONCE = 4  # batches under way
POLL_SEC = 30.0
SAY_EVERY_SEC = 600.0
FULL_SEC = 600.0  # before a batch is sent again that the provider's queue had no room for
REST_SEC = 86_400.0  # in which another run may still be writing and uploading a file
URL = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")
FULL = re.compile(r"enqueued|token_limit|rate_limit|billing_hard", re.IGNORECASE)  # a failure that may pass

ANY_REQUEST: Any = None  # which errors of the client insist on

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Request:
    id: str
    line: bytes
    most: tuple[int, int]  # tokens read and written, of which it has no more


class _Batch:
    """A file of requests, and what the provider calls it."""

    def __init__(self, path: Path, ids: set[str]) -> None:
        self.path, self.ids = path, ids
        self.file_id = self.batch_id = ""

    @classmethod
    def found(cls, state: Path) -> "_Batch":
        """Return a batch that an earlier run has sent."""
        path = state.with_suffix(".jsonl")
        batch = cls(path, {json.loads(line)["custom_id"] for line in path.open("rb")})
        batch.file_id, batch.batch_id = json.loads(state.read_text())
        return batch

    def save(self) -> None:
        save_json(self.path.with_suffix(".json"), [self.file_id, self.batch_id])

    def prompts(self, ids: set[str]) -> Iterator[tuple[str, str]]:
        """Yield id and prompt of some of the requests, the prompt as `Endpoint.render` gives it."""
        for line in self.path.open("rb"):
            request = json.loads(line)
            if request["custom_id"] in ids:
                yield request["custom_id"], as_json(request["body"]["messages"])

    def remove(self) -> None:
        for suffix in (".json", ".jsonl", ".part"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)


class BatchEndpoint(Endpoint):
    """An endpoint that is asked in batches; its answers and their keys are those of single requests."""

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's place and answer as its batch is over.

        Up to AT_ONCE files of prompts are read ahead; the texts stay on disk. Quotas a minute do not apply.

        Raises:
            ValueError, EngineGone: as of single requests, or a batch failed as a whole.
        """
        from openai import OpenAI

        require_end(sampling)
        with OpenAI(api_key=self.key or "none", base_url=self.base_url) as client:
            yield from _Run(self, client, sampling).answers(enumerate(prompts))


class _Run:
    """One pass over prompts, in as many batches as they take."""

    def __init__(self, endpoint: BatchEndpoint, client: Any, sampling: Sampling) -> None:
        self.endpoint, self.client, self.sampling = endpoint, client, sampling
        server = hashlib.sha256(f"{endpoint.address}\n{endpoint.teacher}".encode()).hexdigest()[:16]
        self.folder = Path(WORK_DIR, server)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.batches: list[_Batch] = []
        for state in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # another run has just read it to its end
                self.batches.append(_Batch.found(state))
        for rest in self.folder.glob("*.jsonl"):  # of a run that was killed before it had uploaded it
            with contextlib.suppress(FileNotFoundError):
                if not rest.with_suffix(".json").exists() and time.time() - rest.stat().st_mtime > REST_SEC:
                    rest.unlink()
        self.places: dict[str, list[int]] = {}  # of the prompts that a request answers, until it has
        self.announced: dict[str, tuple[int, int]] = {}
        self.again: list[_Request] = []
        self.tries: Counter[str] = Counter()
        self.unsendable: list[int] = []

    def answers(self, prompts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Answer]]:
        """Send, wait and read until every prompt has its answer."""
        while True:
            while len(self._under_way()) < AT_ONCE and self._send(prompts):
                pass
            while self.unsendable:
                yield self.unsendable.pop(), Answer("", 0, "refused")
            if not self._under_way():
                return
            yield from self._finish(*self._wait())

    def _under_way(self) -> list[_Batch]:
        """Return the batches that hold what is wanted; others of an earlier run are left as they are."""
        return [batch for batch in self.batches if not batch.ids.isdisjoint(self.places)]

    def _next(self, prompts: Iterator[tuple[int, str]]) -> _Request | None:
        """Return what is to be sent next: what is asked again, or the next prompt that no batch holds."""
        if self.again:
            return self.again.pop()
        for place, prompt in prompts:
            try:
                request = self._request(prompt)
            except UnicodeEncodeError:  # a lone surrogate, which no request can carry
                self.unsendable.append(place)
                continue
            asked = request.id in self.places or any(request.id in batch.ids for batch in self.batches)
            self.places.setdefault(request.id, []).append(place)
            if not asked:
                return request
        return None

    def _request(self, prompt: str) -> _Request:
        options = self.endpoint.options(prompt, self.sampling)
        body = {"model": self.endpoint.teacher, "messages": json.loads(prompt), **options}
        body |= body.pop("extra_body", {})
        key = hashlib.sha256(as_json(body).encode()).hexdigest()
        line = {"custom_id": key, "method": "POST", "url": URL, "body": body}
        most = (len(prompt.encode()), self.sampling.max_new_tokens)  # a token is a byte or more
        return _Request(key, as_json(line).encode() + b"\n", most)

    def _send(self, prompts: Iterator[tuple[int, str]]) -> bool:
        """Fill a file up to its limits, or to the cost ceiling, and send it; False if it is empty.

        Raises:
            EngineGone: the next request might cost too much, and nothing under way will make room.
        """
        batch = _Batch(self.folder / f"{uuid.uuid4().hex}.jsonl", set())
        try:
            self._fill(batch, prompts)
            if batch.ids:
                self._submit(batch)
                self.batches.append(batch)
        finally:
            if not batch.file_id:
                batch.remove()
        return bool(batch.ids)

    def _fill(self, batch: _Batch, prompts: Iterator[tuple[int, str]]) -> None:
        size = 0
        with batch.path.open("wb") as file:
            while len(batch.ids) < MAX_REQUESTS and (request := self._next(prompts)):
                size += len(request.line)
                if (size > MAX_BYTES and batch.ids) or not self._can_pay(request, bool(batch.ids)):
                    self.again.append(request)
                    break
                file.write(request.line)
                batch.ids.add(request.id)
            file.flush()
            os.fsync(file.fileno())

    def _can_pay(self, request: _Request, others: bool) -> bool:
        try:
            self.endpoint.meter.announce(time.monotonic(), *request.most)
        except EngineGone:
            if others or self._under_way():
                return False  # what is under way costs less than it might, mostly
            raise
        self.announced[request.id] = request.most
        return True

    def _submit(self, batch: _Batch) -> None:
        """Upload a batch's file and start it, each noted at once so that no restart pays for it again."""
        if not batch.file_id:
            batch.file_id = self._call(self.client.files.create, file=batch.path, purpose="batch").id
            batch.save()
        for failures in range(1, ROUNDS + 1):
            # Not by the client's own retries: the server may have started a batch and lost the connection
            start = self.client.with_options(max_retries=0).batches.create
            try:
                made = start(input_file_id=batch.file_id, endpoint=URL, completion_window="24h")
                break
            except Exception as err:
                self._pause(err, failures)
                if made := self._started(batch):
                    break
        batch.batch_id = made.id
        batch.save()
        self._say(f"batch {batch.batch_id} of {len(batch.ids)} requests sent")

    def _started(self, batch: _Batch) -> Any:
        """Return the provider's batch over a batch's file, None where there is none."""
        pages = self._call(self.client.batches.list, limit=100)
        return next((one for one in pages if one.input_file_id == batch.file_id), None)

    def _wait(self) -> tuple[_Batch, Any]:
        """Return the first batch to be over, and what the provider says of it."""
        said = time.monotonic()
        while True:
            for batch in self._under_way():
                if not batch.batch_id:  # the run before ended between uploading and starting, or just after
                    if made := self._started(batch):
                        batch.batch_id = made.id
                        batch.save()
                    else:
                        self._submit(batch)
                state = self._call(self.client.batches.retrieve, batch.batch_id)
                if state.status in OVER:
                    return batch, state
                if time.monotonic() - said > SAY_EVERY_SEC:
                    counts = state.request_counts
                    done = f", {counts.completed} of {counts.total} requests done" if counts else ""
                    self._say(f"batch {batch.batch_id} {state.status}{done}")
            if time.monotonic() - said > SAY_EVERY_SEC:
                said = time.monotonic()
            time.sleep(POLL_SEC)

    def _finish(self, batch: _Batch, state: Any) -> Iterator[tuple[int, Answer]]:
        """Yield a batch's answers; what has none is asked again, as a single request would be.

        The batch's files go when the last answer was taken, so that a run killed before reads it again.
        """
        left = batch.ids & self.places.keys()
        options = self.endpoint.options("[]", self.sampling)  # as they were when the batch was sent
        reasons: Counter[str] = Counter()
        fault: EngineGone | None = None
        for line in self._lines(batch, state):
            try:
                key = json.loads(line)["custom_id"]
            except (ValueError, TypeError, KeyError):
                continue  # its request is among those that are left
            if key not in left:
                continue
            try:
                answer = self._answer(json.loads(line), options)
            except EngineGone as err:
                fault = err
                continue
            except Unusable as err:
                reasons[one_line(err)] += 1
                continue
            left.discard(key)
            self._settle(key, answer)
            for place in self.places.pop(key):
                yield place, answer
        for key in left:
            self._settle(key, None)
        if not left:
            batch.remove()
            self.batches.remove(batch)
            return
        why = "; ".join(f"{count} times {reason}" for reason, count in reasons.most_common(2))
        why = why or self._told_of(state) or "no line of theirs in its output"
        unanswered = f"{len(left)} of {len(batch.ids)} requests unanswered"
        told = f"batch {batch.batch_id} {state.status}: {unanswered}, {why}"
        if fault is None and state.status == "failed" and not FULL.search(why):
            fault = EngineGone(f"{self.endpoint.address}: {told}; change what it names and run again")
        if fault is None and max(self.tries[key] for key in left) + 1 >= ROUNDS:
            fault = EngineGone(f"{self.endpoint.address}: {told}, {ROUNDS} times over; see to the server")
        if fault is None:
            self._say(f"{told}; they are asked again")
            self._ask_again(batch, left)
        batch.remove()
        self.batches.remove(batch)
        if fault:
            raise fault
        if state.status == "failed":
            time.sleep(FULL_SEC)  # until the provider's queue has room

    def _lines(self, batch: _Batch, state: Any) -> Iterator[bytes]:
        """Yield the lines of a batch's output and error files, by way of the disk."""
        for file_id in filter(None, (state.output_file_id, state.error_file_id)):
            path = batch.path.with_suffix(".part")
            self._call(self._download, file_id, path)
            with path.open("rb") as lines:
                yield from lines
            path.unlink()

    def _download(self, file_id: str, path: Path) -> None:
        from openai import APIConnectionError, OpenAIError

        try:
            with self.client.files.with_streaming_response.content(file_id) as response:
                response.stream_to_file(path)
        except (OpenAIError, OSError):
            raise
        except Exception as err:  # the client wraps no error that comes in the middle of a stream
            raise APIConnectionError(message=f"{type(err).__name__}: {err}", request=ANY_REQUEST) from err

    def _answer(self, line: dict[str, Any], options: dict[str, Any]) -> Answer:
        """Return the answer of an output line.

        Raises:
            EngineGone: the request is turned down for what it says, as every other would be.
            Unusable: there is none; ask again.
        """
        from openai import APIStatusError
        from openai.types.chat import ChatCompletion

        response, failure = line.get("response") or {}, line.get("error") or {}
        body, status = response.get("body"), response.get("status_code")
        if status == 200:
            if not isinstance(body, dict):
                raise Unusable(f"no chat completion but {str(body)[:100]}")
            return self.endpoint.as_answer(ChatCompletion.construct(**body))
        if not isinstance(status, int):
            raise Unusable(str(failure.get("code") or failure.get("message") or "no response")[:100])
        reply: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        err = APIStatusError("", response=reply, body=body or failure)
        if self.endpoint.refuses(err):
            return Answer("", 0, "refused")
        if self.endpoint.learn(err, options) or self.endpoint.may_pass(err):
            raise Unusable(f"status {status}")
        raise EngineGone(self.endpoint.explain(err))

    def _settle(self, key: str, answer: Answer | None) -> None:
        """Put what a request cost in the place of what it might have."""
        most = self.announced.pop(key, (0, 0))  # nothing, of an earlier run's
        used = (0, 0)
        if answer and answer.finish_reason != "refused":
            used = (answer.prompt_tokens or most[0], answer.tokens or most[1])
        self.endpoint.meter.settle(most, used)

    def _ask_again(self, batch: _Batch, ids: set[str]) -> None:
        for old, prompt in batch.prompts(ids):
            request = self._request(prompt)  # another one where the server has taught other options
            self.tries[request.id] = self.tries.pop(old, 0) + 1
            places = self.places.pop(old)
            self.places.setdefault(request.id, []).extend(places)
            self.again.append(request)

    def _call(self, do: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call the provider, again after what may pass.

        Raises:
            EngineGone: it turns the call down, or is gone for good.
        """
        for failures in range(1, ROUNDS + 1):
            try:
                return do(*args, **options)
            except Exception as err:
                self._pause(err, failures)
        raise AssertionError("the last failure raises")

    def _pause(self, err: Exception, failures: int) -> None:
        """Wait after a failed call, or tell why no wait will help."""
        from openai import APIConnectionError, APIStatusError

        endpoint = self.endpoint
        if isinstance(err, APIStatusError):
            if err.status_code in (404, 405, 501):
                raise EngineGone(
                    f"{endpoint.address}: found no batch API, or no more what was sent to it"
                    f" ({endpoint.told(err)}); set label.batch_api: false, or remove {self.folder}"
                ) from None
            if not endpoint.may_pass(err):
                raise EngineGone(endpoint.explain(err)) from None
        elif not isinstance(err, APIConnectionError | json.JSONDecodeError):
            raise err
        if failures == ROUNDS:
            raise EngineGone(
                f"{endpoint.address}: no usable reply in {ROUNDS} rounds of tries, the last:"
                f" {endpoint.told(err)}; run again, batches that were sent are read on"
            ) from None
        time.sleep(pause_sec(err, failures))

    def _told_of(self, state: Any) -> str:
        """Return what the provider says is wrong with a batch as a whole."""
        errors = getattr(state.errors, "data", None) or []
        return "; ".join(" ".join(filter(None, (one.code, one.message))) for one in errors[:2])

    def _say(self, line: str) -> None:
        print(f"{self.endpoint.address}: {line}", file=sys.stderr, flush=True)

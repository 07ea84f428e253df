"""The engine that asks a server: anything that speaks OpenAI's chat completions.

Retries come in two layers. The client itself repeats a request after 408, 409, 429, 5xx, timeouts and lost
connections, with backoff, jitter and the server's Retry-After. Around it a few rounds with longer pauses
bridge a server's restart, and cover what the client takes for an answer: a proxy's HTML page, broken JSON.
"""

import itertools
import json
import os
import queue
import random
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from distill_app.core.errors import EngineGone
from distill_app.core.prompts import Mode, teacher_messages
from distill_app.generation.answers import Answer, FinishReason, Sampling, seed_of
from distill_app.generation.quota import Meter, Quota

CLIENT_RETRIES = 2
ROUNDS = 4  # with the pauses between them, a server has about a minute to come back
PAUSE_SEC = 4.0  # doubles with every round
LONGEST_PAUSE_SEC = 600.0  # however long a server asks for
TIMEOUT_SEC = 600.0  # of one request; a busy server on a CPU takes minutes
FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",  # TGI
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",  # Mistral
    "content_filter": "refused",
}
FAILED = ("abort", "error")  # vLLM's words for what it did not finish; it may the next time
LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1|0\.0\.0\.0")
# What servers say of one prompt that they will not answer: OpenAI and Azure, vLLM, SGLang, llama.cpp, TGI
REFUSAL = re.compile(
    r"context.?(length|size|window)|too long|longer than|content.?(filter|policy|management)|invalid_prompt",
    re.IGNORECASE,
)


class Unusable(Exception):
    """A response that is no chat completion."""


class Endpoint:
    """A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, a hosted API.

    Without `api_key` the key comes from OPENAI_API_KEY; a server that asks for none works without it. At
    temperature 0 neither top_p nor a seed is sent.

    Args:
        teacher: the model's name on the server.
        base_url: where `/chat/completions` follows, such as `http://localhost:8000/v1`.
        concurrency: requests under way at most.
        revision: of the weights, as far as the user knows. Answers then belong to that model and revision,
            wherever they are served; without it, to the server, and one on this machine to this machine.
        system_prompt: a message of the system's before the user's; part of the prompt. None sends none.
        api_key: the server's key; never shown, never stored.
        quota: what may be asked; None is no limit.

    Raises:
        ValueError: the URL, the concurrency or the key cannot be right.
    """

    def __init__(
        self,
        teacher: str,
        base_url: str,
        concurrency: int,
        revision: str | None = None,
        system_prompt: str | None = None,
        api_key: str = "",
        quota: Quota | None = None,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            shown = base_url.rpartition("@")[2]  # without credentials
            raise ValueError(f'base_url: found "{shown}", expected a URL such as http://localhost:8000/v1')
        if concurrency < 1:
            raise ValueError(f"concurrency: found {concurrency}, expected 1 or more")
        self.teacher, self.base_url, self._concurrency = teacher, base_url, concurrency
        host = url.netloc.rpartition("@")[2]  # user, password and query may be secrets
        self.address = urlunsplit((url.scheme, host, url.path.rstrip("/"), "", ""))
        self.identity: dict[str, Any] = {"engine": "openai", "model": teacher}
        if revision is not None:
            self.identity["revision"] = revision
        else:
            self.identity["endpoint"] = self.address
            if LOOPBACK.fullmatch(url.hostname):
                self.identity["machine"] = socket.gethostname()
        self._system_prompt = system_prompt
        self._key_name = "api_key" if api_key else "OPENAI_API_KEY"
        self.key = (api_key or os.environ.get("OPENAI_API_KEY", "")).strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError(f"{self._key_name}: found characters that no header carries; set the key again")
        self._limit_name = "max_tokens"  # what most servers speak; OpenAI's newer models want the other
        self._sends_seed = True
        self._unknown_ends: set[str] = set()
        self.meter = Meter(quota or Quota())

    def render(self, instruction: str, input_text: str, mode: Mode) -> str:
        """Return the chat messages as JSON, the same bytes for the same words."""
        messages = teacher_messages(instruction, input_text, mode, self._system_prompt)
        return as_json(messages)

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's place and answer as it comes; as many prompts are read as are under way.

        Token counts are the server's, 0 where it sends none. A prompt that the server turns down (too long
        for the model, against its rules) is answered with "refused".

        Raises:
            ValueError: `sampling.stop_at_eos` is False, which the protocol cannot say.
            EngineGone: the server is gone, turns every request down, or sends no chat completions.
        """
        from anyio.from_thread import start_blocking_portal
        from openai import AsyncOpenAI, Timeout

        require_end(sampling)
        numbered = enumerate(prompts)
        done: queue.SimpleQueue[tuple[int, Future[Answer]]] = queue.SimpleQueue()
        client = AsyncOpenAI(
            api_key=self.key or "none",  # the client insists on one, servers without keys ignore it
            base_url=self.base_url,
            max_retries=CLIENT_RETRIES,
            timeout=Timeout(TIMEOUT_SEC, connect=min(TIMEOUT_SEC, 5.0)),
        )
        # Prompts are read and answers handed out in the caller's thread; only requests run in the portal's
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):

            def ask(place: int, prompt: str) -> None:
                future = portal.start_task_soon(self._ask, client, prompt, sampling)
                future.add_done_callback(lambda f: done.put((place, f)))

            running = 0
            for place, prompt in itertools.islice(numbered, self._concurrency):
                ask(place, prompt)
                running += 1
            while running:
                place, future = done.get()
                if future.exception():
                    yield from _succeeded(done)
                answer = future.result()
                following = next(numbered, None)
                if following:
                    ask(*following)
                else:
                    running -= 1
                yield place, answer

    def close(self) -> None:
        """Nothing is held between calls of `generate`."""

    async def _ask(self, client: Any, prompt: str, sampling: Sampling) -> Answer:
        import anyio
        import openai

        request = {"model": self.teacher, "messages": json.loads(prompt)}
        failures = 0
        while True:
            options = self.options(prompt, sampling)
            most = (
                len(prompt.encode("utf-8", "replace")),
                sampling.max_new_tokens,
            )  # a token is a byte or more
            used, wait_sec = most, self.meter.announce(time.monotonic(), *most)
            try:
                await anyio.sleep(wait_sec)
                answer = self.as_answer(await client.chat.completions.create(**request, **options))
                used = (answer.prompt_tokens or most[0], answer.tokens or most[1])
                return answer
            except UnicodeEncodeError:  # a lone surrogate, which no request can carry
                used = (0, 0)
                return Answer("", 0, "refused")
            except openai.APIStatusError as err:
                used = (0, 0)
                if self.refuses(err):
                    return Answer("", 0, "refused")
                if self.learn(err, options):
                    continue
                if not self.may_pass(err):
                    raise EngineGone(self.explain(err)) from None
                failure: Exception = err
            except (openai.APIConnectionError, json.JSONDecodeError, Unusable) as err:
                failure = err
            finally:
                self.meter.settle(most, used)
            failures += 1
            # The client alone has waited for half an hour by now, unless it could not even connect
            hung = isinstance(failure, openai.APITimeoutError) and not _never_connected(failure)
            if failures == ROUNDS or hung:
                raise EngineGone(
                    f"{self.address}: no usable answer in {failures} rounds of tries, the"
                    f" last: {self.told(failure)}; see to the server and run again, what was"
                    " answered before stays"
                ) from None
            await anyio.sleep(pause_sec(failure, failures))

    def as_answer(self, completion: Any) -> Answer:
        """Return a chat completion as an answer; the client checks no types, so nothing is taken for granted.

        An end that nobody knows, such as a call of a tool, is no answer to train on; the run goes on.
        """
        try:
            choice = completion.choices[0]
            reason, message = choice.finish_reason, choice.message
            text = message.content or ""  # null where the server refuses, or cut a model that still thought
            usage = completion.usage
            out, read = (usage.completion_tokens or 0, usage.prompt_tokens or 0) if usage else (0, 0)
            refused = bool(getattr(message, "refusal", None))
        except (AttributeError, IndexError, TypeError):
            raise Unusable(f"no chat completion but {completion}") from None
        if not isinstance(reason, str) or reason in FAILED:
            raise Unusable(f"no whole chat completion but {completion}")
        if reason not in FINISH and reason not in self._unknown_ends:
            self._unknown_ends.add(reason)
            print(
                f'{self.address}: found finish_reason "{reason}", expected one of {", ".join(FINISH)}; such'
                " answers are left out as refused",
                file=sys.stderr,
            )
        finish = "refused" if refused else FINISH.get(reason, "refused")
        return Answer("" if finish == "refused" else text.strip(), out, finish, read)

    def options(self, prompt: str, sampling: Sampling) -> dict[str, Any]:
        """Return a request's settings, in the words that this server takes."""
        options: dict[str, Any] = {
            self._limit_name: sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        # No setting of OpenAI's own, but of the servers that people run; sent where it is on
        more = {"repetition_penalty": sampling.repetition_penalty} if sampling.repetition_penalty != 1 else {}
        if sampling.temperature:
            drawn = {"top_k": sampling.top_k, "min_p": sampling.min_p}
            more |= {name: value for name, value in drawn.items() if value}
            options["top_p"] = sampling.top_p
            if self._sends_seed:
                options["seed"] = seed_of(prompt, sampling.seed)
        return options | ({"extra_body": more} if more else {})

    def refuses(self, err: Any) -> bool:
        """Tell whether the server will not answer this prompt, though it would others."""
        refusable = err.status_code in (400, 422, 500) and REFUSAL.search(_words(err))
        return bool(refusable) or err.status_code == 413

    def may_pass(self, err: Any) -> bool:
        """Tell whether the same request may be answered later."""
        return err.status_code >= 500 or err.status_code in (408, 409, 429)

    def learn(self, err: Any, options: dict[str, Any]) -> bool:
        """Tell whether the server turned down a parameter that can be said otherwise or left out."""
        words = _words(err)
        if err.status_code not in (400, 422):
            return False
        if "max_tokens" in options and "max_completion_tokens" in words:
            self._limit_name = "max_completion_tokens"
            return True
        if "seed" in options and re.search(r"\bseed\b", words):
            if self._sends_seed:
                print(
                    f"{self.address}: takes no seed; sampled answers will differ from run to run",
                    file=sys.stderr,
                )
            self._sends_seed = False
            return True
        return False

    def explain(self, err: Any) -> str:
        """Return why a server turned a request down, and what to do, in one line."""
        words = self.told(err)
        if err.status_code in (401, 403):
            key = f"the key in {self._key_name} was refused" if self.key else "OPENAI_API_KEY is not set"
            return f"{self.address}: {err.status_code}, {key}; set it to a key that this server takes"
        if err.status_code == 404:
            return (
                f'{self.address}: 404 for model "{self.teacher}" ({words}); fix the model\'s name, or the'
                " URL, which mostly ends in /v1"
            )
        return f"{self.address}: the server turned the request down ({words}); change the setting it names"

    def told(self, err: Exception) -> str:
        """Return what an error says, in a short line without the key, which some servers repeat."""
        words = _words(err)
        if self.key:
            words = words.replace(self.key, "***")
        return words if len(words) <= 300 else f"{words[:300]}…"


def _succeeded(done: "queue.SimpleQueue[tuple[int, Future[Answer]]]") -> Iterator[tuple[int, Answer]]:
    """Yield the answers that lie ready; they were paid for."""
    while not done.empty():
        place, future = done.get()
        if not future.exception():
            yield place, future.result()


def _words(err: Exception) -> str:
    """Return what the server said, whole, or else what went wrong, in one line."""
    from openai import APIStatusError

    text = str(err)
    if isinstance(err, APIStatusError):  # its own text leaves out the code and the type
        body = err.body if isinstance(err.body, str) else json.dumps(err.body, ensure_ascii=False)
        text = f"{err.status_code}: {body}"
    return " ".join(text.split())


def as_json(value: Any) -> str:
    """Return JSON that is the same bytes for the same words."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def require_end(sampling: Sampling) -> None:
    """Refuse what the protocol cannot say.

    Raises:
        ValueError: `sampling.stop_at_eos` is False.
    """
    if not sampling.stop_at_eos:
        raise ValueError("stop_at_eos: found False, but servers always stop at the end of sequence")


def pause_sec(err: Exception, failures: int) -> float:
    """Return the seconds until the next round: backoff with jitter, or longer if the server asks for it."""
    pause = PAUSE_SEC * 2**failures * random.uniform(0.75, 1.0)
    wanted = err.response.headers.get("retry-after", "") if hasattr(err, "response") else ""
    return max(pause, min(float(wanted), LONGEST_PAUSE_SEC)) if wanted.isdigit() else pause


def _never_connected(err: Exception) -> bool:
    return "ConnectTimeout" in type(err.__cause__).__name__

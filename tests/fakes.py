"""A teacher without a model, and a labelling run with it as a process of its own that a test can kill."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from distill_app.generation.answers import Answer, Sampling
from distill_app.labeling.label import label_files
from distill_app.labeling.params import LabelParams
from distill_app.labeling.store import AnswerStore

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "heldout")


class Echo:
    """Answers each prompt with itself; the answer has as many tokens as the prompt's last word says.

    Args:
        ahead: prompts taken before the first of them is answered.
        pause_sec: before each answer.
        asked_path: a file that gets a line a prompt as it is asked.
    """

    teacher = "echo"

    def __init__(self, ahead: int = 4, pause_sec: float = 0.0, asked_path: Path | None = None) -> None:
        self.identity = {"engine": "fake", "version": "fake 1"}
        self.ahead, self.pause_sec, self.asked_path = ahead, pause_sec, asked_path
        self.asked: list[str] = []
        self.before_answer: Callable[[str], None] = lambda prompt: None

    def render(self, instruction: str, input_text: str, mode: str) -> str:
        return f"{instruction} {input_text}".strip()

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        numbered = enumerate(prompts)
        while batch := list(islice(numbered, self.ahead)):
            for _, prompt in batch:
                self._note(prompt)
            for place, prompt in reversed(batch):
                time.sleep(self.pause_sec)
                self.before_answer(prompt)
                yield place, self.answer(prompt, sampling)

    def answer(self, prompt: str, sampling: Sampling) -> Answer:
        needed = int(prompt.split()[-1])
        if needed < 0:
            return Answer("", 0, "refused", 5)
        tokens = min(needed, sampling.max_new_tokens)
        text = f"{prompt} at {sampling.temperature} in {tokens}" if needed else ""
        return Answer(text, tokens, "stop" if needed == tokens else "length", len(prompt.split()))

    def close(self) -> None:
        pass

    def _note(self, prompt: str) -> None:
        self.asked.append(prompt)
        if self.asked_path:
            with self.asked_path.open("a") as file:
                file.write(f"{os.getpid()}\t{prompt}\n")


def label_params(**changes: object) -> LabelParams:
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["label"]
    return LabelParams.model_validate({**section, "max_new_tokens": 8, **changes})


def write_instructions(folder: Path, train: int, heldout: int) -> None:
    """Write numbered instructions; every seventh prompt comes twice, answers have 0 to 9 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", 0, train), ("heldout", 10_000, heldout)):
        numbers = [n - 1 if n % 7 == 6 else n for n in range(first, first + count)]
        records = [{"instruction": f"say {n}", "input": str(n % 10), "output": "x"} for n in numbers]
        (folder / f"{split}.json").write_text(json.dumps(records))


def label_folder(folder: Path, store: Path, engine: Echo, **changes: object) -> dict:
    """Label train.json and heldout.json of a folder beside themselves."""
    splits = {s: (str(folder / f"{s}.json"), str(folder / f"{s}_labeled.json")) for s in SPLITS}
    with AnswerStore(store) as answers:
        return label_files(
            engine,
            answers,
            label_params(**changes),
            splits,
            str(folder / "dropped.json"),
            str(folder / "label.log"),
        )


if __name__ == "__main__":
    place, store_path, asked, ahead, pause = sys.argv[1:]
    label_folder(Path(place), Path(store_path), Echo(int(ahead), float(pause), Path(asked)))


def servers(kind: Callable[..., ThreadingHTTPServer]) -> Iterator[Callable[..., Any]]:
    """Give a fixture that makes servers, which end with the test."""
    made: list[Any] = []

    def make(*args: object, **options: object) -> Any:
        made.append(kind(*args, **options))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def go_straight(monkeypatch: Any) -> None:
    """Let clients use no proxy of this machine's."""
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

"""Why EasyDistill 1.0 failed, read from what it printed: its exit code does not tell."""

import re

from distill_app.easydistill.child import Finished

LAUNCH_FILE = "configs/accelerate_config/muti_gpu.yaml"  # in the folder that holds its package
# What its log says, and what that means and asks for
KNOWN_CAUSES = (
    (
        r"Tokenizer class \S+ does not exist",
        "its transformers 4.51 does not know the class that the student's tokenizer names; start from a"
        " checkpoint that this project saved, or set tokenizer_class to PreTrainedTokenizerFast in the"
        " student's tokenizer_config.json",
    ),
    (
        r"does not recognize this architecture",
        "its transformers 4.51 is older than the student's architecture; take another student or backend"
        ' "builtin"',
    ),
    (
        r"SFTConfig.* got an unexpected keyword argument",
        "its TRL 0.17 does not know the field of training that its last line names; remove it",
    ),
    (
        r"DeepSpeed is not installed|No module named 'deepspeed'|invalid device ordinal|no GPUs found",
        f"its launch file, {LAUNCH_FILE}, starts processes with DeepSpeed, one a GPU; fix its num_processes,"
        " or set that above the number of GPUs to train in one process",
    ),
)
# Its own words around a line that it took for a failure
WRAPPER = re.compile(r"Detected error in output|Command failed|Running command")
LOG_PREFIX = re.compile(r"^([\d :,-]+ - [A-Z]+ - |[A-Z]+:root:)")


def explain(finished: Finished) -> str | None:
    """Return in one line why EasyDistill failed and what to do; None if its log does not tell."""
    log = "\n".join(finished.lines)
    for pattern, meaning in KNOWN_CAUSES:
        if re.search(pattern, log):
            return meaning
    line = _first_complaint(finished.lines)
    if line is None:
        return None
    if finished.code != 0:
        return f'the cause is "{line}"'
    return (
        f'its log says "{line}": at a line with "error", "failed" or "exception" in it EasyDistill 1.0'
        " gives up without a word and still exits with 0; fix what the line says"
    )


def _first_complaint(lines: list[str]) -> str | None:
    """Return the first exception's own line, else the first line with a word that EasyDistill stops at."""
    own = [bare(line) for line in lines if not WRAPPER.search(line)]
    raised = [line for line in own if re.match(r"[\w.]*(Error|Exception)\b", line)]
    named = [line for line in own if re.search("error|failed|exception", line, re.IGNORECASE)]
    return next(iter(raised + named), None)


def bare(line: str) -> str:
    """Return a log line without time and level, at most 200 characters of it."""
    return LOG_PREFIX.sub("", line).strip()[:200]

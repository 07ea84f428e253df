import subprocess
import sys

import pytest


def distill(*arguments, cwd=None, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "distill_app", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=stdin,
    )


def test_a_question_is_answered_from_the_shell_and_from_a_pipe(tiny_model_dir):
    one = distill("ask", str(tiny_model_dir), "Name three.", "--max-new-tokens", "4")
    two = distill("ask", str(tiny_model_dir), "-", "--max-new-tokens", "4", stdin="Name three.\n")
    assert one.returncode == two.returncode == 0, one.stderr
    assert one.stdout == two.stdout != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "./none", "Hello?"], "error: ./none: no such model folder"),
        (["ask", "./none", " "], "error: question: found nothing"),
        (["profile", "llama"], "error: profiles/llama.yaml: no such profile; there are: none"),
        (["report"], "error: reports/comparison.json: no such file"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_1(tmp_path, arguments, message):
    run = distill(*arguments, cwd=tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith(message) and run.stderr.count("\n") == 1

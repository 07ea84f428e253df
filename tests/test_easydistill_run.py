"""The real EasyDistill: against stand-ins of it, and (full) itself, in what `make easydistill` builds."""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from trainings import dtypes_of

from distill_app import load_student, run_easy_distill, write_system1_config
from distill_app.core.models import check_checkpoint
from distill_app.core.prompts import chat_template
from distill_app.easydistill import real
from distill_app.easydistill.job import Models, read_job
from distill_app.easydistill.real import VENV, find_program
from distill_app.easydistill.run import choose_backend

RECORDS = [
    {"instruction": f"Name number {n}.", "input": "" if n % 2 else "quick", "output": f"It is {n}."}
    for n in range(12)
]
LAUNCH_FILE = "distributed_type: DEEPSPEED\nnum_processes: 8\nuse_cpu: false\n"
TRL = """
from dataclasses import make_dataclass
SFTConfig = make_dataclass("SFTConfig", [
    "output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_length", "save_steps", "logging_steps", "learning_rate", "weight_decay", "warmup_ratio",
    "lr_scheduler_type", "disable_tqdm", "report_to", "save_only_model",
])
"""
SAVES = """
import json, os, shutil, sys
config = json.load(open(sys.argv[2]))
out = config["training"]["output_dir"]
shutil.copytree(config["models"]["student"], out)
os.makedirs(out + "/checkpoint-2")
history = [{"step": 1, "loss": 4.5}, {"step": 2, "loss": 3.25}, {"step": 2, "train_loss": 4.0}]
json.dump({"log_history": history}, open(out + "/checkpoint-2/trainer_state.json", "w"))
"""
needs_easydistill = pytest.mark.skipif(
    not (ROOT / VENV / "installed").exists(), reason=f"no {VENV}; make easydistill builds it"
)


@pytest.fixture
def project(tmp_path, tiny_model_dir, monkeypatch):
    """A folder with labelled data and a System 1 config for the tiny student."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("labeled.json").write_text(json.dumps(RECORDS))
    write_config(tiny_model_dir)
    return folder


def write_config(student, **training):
    write_system1_config(
        config_path="configs/s1.json",
        student_model=str(student),
        labeled_path="labeled.json",
        out_dir="models/s1",
        training=training,
        backend="builtin",
    )


def change_config(**sections):
    path = Path("configs/s1.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **sections}))


def run():
    return run_easy_distill("configs/s1.json", backend="easydistill")


@pytest.fixture
def install(project, tmp_path, monkeypatch):
    """Give a function that puts a stand-in EasyDistill with a Python of its own on PATH.

    Its arguments: what its command does, in the shell, with $CONFIG; what its kd/train.py does, None for a
    package without it; the GPUs that its Python sees; its launch file.
    """
    home = tmp_path / "clone"

    def put(command="exit 9", trainer=SAVES, gpus=8, launch_file=LAUNCH_FILE, deepspeed=True):
        write_program(home / "bin" / "easydistill", f'CONFIG="$2"\n{command}')
        write_program(home / "bin" / "python", f'PYTHONPATH="{home}" exec "{sys.executable}" -S "$@"')
        files = {
            "easydistill/__init__.py": "",
            "easydistill/kd/train.py": trainer,
            "configs/accelerate_config/muti_gpu.yaml": launch_file,
            "torch.py": f"class cuda:\n    device_count = staticmethod(lambda: {gpus})\n",
            "trl.py": TRL,
            "deepspeed.py": "" if deepspeed else None,
        }
        for name, content in files.items():
            if content is not None:
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).write_text(content)
        monkeypatch.setenv("PATH", str(home / "bin"), prepend=":")
        return home

    return put


def write_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_trainer_that_exits_0_without_weights_has_failed(install, capfd):
    install("echo killed for memory; exit 0")
    assert run() == 1
    err = capfd.readouterr().err
    assert "exit code 0, but no checkpoint" in err and err.count("killed for memory") == 2
    assert not Path("models").exists()


def test_the_exit_code_of_a_trainer_that_failed_is_returned(install, capfd):
    install("exit 7")
    assert run() == 7
    assert "exit code 7" in capfd.readouterr().err


def test_old_weights_are_not_taken_for_new_ones_and_stay(install, tiny_model_dir):
    shutil.copytree(tiny_model_dir, "models/s1")
    install("exit 0")
    assert run() == 1
    assert Path("models/s1/model.safetensors").is_file()


def test_a_student_of_its_command_is_saved_as_ours_are(install):
    install('exec python "$(dirname "$0")/../easydistill/kd/train.py" --config "$CONFIG"')
    assert run() == 0
    tokenizer = load_student("models/s1")[1]
    assert tokenizer.chat_template == chat_template("system1")
    assert dtypes_of("models/s1") == {torch.bfloat16}
    assert Path("models/s1/loss.csv").read_text() == "step,loss\n1,4.5\n2,3.25\n"
    assert not [p for p in Path("models/s1").iterdir() if p.is_dir()]
    card = Path("models/s1/README.md").read_text()
    assert "| backend | easydistill |" in card and "`labeled.json`, SHA-256" in card


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gpus": 2}, "its launch file asks for 8 GPUs, found 2; its trainer runs in one process"),
        ({"deepspeed": False}, "asks for DeepSpeed, which is not installed in its environment"),
        ({"launch_file": None}, "no launch file"),
    ],
)
def test_where_its_launcher_cannot_work_its_trainer_runs_in_one_process(install, options, told, capfd):
    install(**options)
    assert run() == 0
    assert told in capfd.readouterr().err
    check_checkpoint("models/s1")


def test_an_edited_launch_file_is_believed(install):
    install("exit 3", gpus=2, launch_file=LAUNCH_FILE.replace("8", "2"))
    assert run() == 3


def test_one_process_sees_one_gpu(install, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    seen = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    install(trainer=seen, gpus=2)
    run()
    assert (tmp_path / "seen").read_text() == "3"


def test_it_gets_absolute_paths_a_scratch_copy_and_no_key_of_ours(install, tmp_path, tiny_model_dir, capfd):
    write_config(tiny_model_dir, too_new=1)
    install(f'cp "$CONFIG" {tmp_path}/seen.json; cp "$(dirname "$CONFIG")/labeled.json" {tmp_path}/')
    run()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert set(seen) == {"job_type", "dataset", "models", "training"}
    assert seen["job_type"] == "kd_black_box_train_only"
    assert "too_new" not in seen["training"] and seen["training"]["learning_rate"] == 2e-5
    assert "training.too_new: unknown to its TRL; left out" in capfd.readouterr().err
    for path in (
        seen["dataset"]["labeled_path"],
        seen["dataset"]["template"],
        seen["training"]["output_dir"],
        seen["models"]["student"],
    ):
        assert Path(path).is_absolute()
    labeled = json.loads((tmp_path / "labeled.json").read_text())
    assert labeled[0] == {"instruction": "Name number 0.\nInput: quick", "output": "It is 0."}
    assert json.loads(Path("labeled.json").read_text()) == RECORDS


def test_no_path_that_it_gets_has_a_space(install, tmp_path, tiny_model_dir, monkeypatch):
    install(f'cp "$CONFIG" {tmp_path}/seen.json')
    (tmp_path / "t m p").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t m p"))
    shutil.copytree(tiny_model_dir, "my model")
    write_config("my model")
    run()
    seen = json.loads((tmp_path / "seen.json").read_text())
    for path in (*seen["dataset"].values(), *seen["models"].values(), seen["training"]["output_dir"]):
        assert " " not in str(path)


def test_what_a_trainer_started_ends_with_it(install, tmp_path):
    install(f"(sleep 30; touch {tmp_path}/outlived) & echo $! > {tmp_path}/pid; echo last words; exit 3")
    assert run() == 3
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or " Z " in stat.read_text()
    assert not (tmp_path / "outlived").exists()


def test_an_easydistill_that_is_not_there_is_told(project, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run() == 1
    assert "no such command on PATH or in .venv-easydistill; run `make easydistill`" in capfd.readouterr().err


def test_the_command_of_make_easydistill_is_found_without_path(project, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert find_program() is None
    write_program(Path(VENV, "bin", "easydistill"), "exit 0")
    assert find_program() == str(project / VENV / "bin" / "easydistill")


def test_an_easydistill_without_a_trainer_is_refused_before_it_starts(install, capfd):
    home = install("echo started", trainer=None)
    (home / "easydistill-2.0.0.dist-info").mkdir()
    (home / "easydistill-2.0.0.dist-info" / "METADATA").write_text("Name: easydistill\nVersion: 2.0.0\n")
    assert run() == 1
    err = capfd.readouterr().err
    assert "found version 2.0.0 without a trainer, expected EasyDistill 1.0" in err and "started" not in err


def test_a_command_whose_python_lacks_the_package_is_refused(install, capfd):
    home = install("echo started")
    shutil.rmtree(home / "easydistill")
    assert run() == 1
    assert "found no such package in" in capfd.readouterr().err


@pytest.fixture
def wrap(install, tmp_path, monkeypatch):
    """Give a function that puts a wrapper script on PATH before the stand-in, which it calls by its place."""

    def put(call='exec "{home}/bin/easydistill" "$@"', **options):
        home = install(WRAPPED, **options)
        write_program(tmp_path / "wrappers" / "easydistill", call.format(home=home))
        monkeypatch.setenv("PATH", f"{tmp_path / 'wrappers'}:/usr/bin:/bin")
        return home

    return put


WRAPPED = """
case "$1" in --help) echo "usage: easydistill [-h] --config CONFIG"; exit 0;; esac
exec "$(dirname "$0")/python" "$(dirname "$0")/../easydistill/kd/train.py" --config "$CONFIG"
"""


def test_a_wrapper_script_is_run_as_it_is_and_what_cannot_be_checked_is_told(wrap, project, capfd):
    """As one around docker or conda: no Python beside it has the package."""
    wrap(gpus=0)
    change_config(training={**json.loads(Path("configs/s1.json").read_text())["training"], "too_new": 1})
    assert run() == 0
    check_checkpoint("models/s1")
    err = capfd.readouterr().err
    assert "wrappers/easydistill is a wrapper: what is behind it cannot be checked" in err
    assert f"it must see {project} under that path" in err and "left out" not in err
    assert list(Path("work").iterdir()) == []


def test_a_wrapper_gets_paths_in_the_project_and_runs_there(wrap, project, tmp_path):
    seen = f"import json, os, sys; c = json.load(open(sys.argv[2])); json.dump([c, os.getcwd()], open({str(tmp_path / 'seen')!r}, 'w'))"
    wrap(trainer=seen)
    assert run() == 1
    config, place = json.loads((tmp_path / "seen").read_text())
    assert Path(place) == project
    for path in (*config["dataset"].values(), config["training"]["output_dir"]):
        assert isinstance(path, int) or path.startswith(f"{project}/work/")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            "echo no such container >&2; exit 125",
            "names no --config (no such container), expected EasyDistill 1.0",
        ),
        ("echo usage: --config --list-jobs", "found version 2 without a trainer"),
        ("exit 0", "names no --config (0), expected"),
    ],
)
def test_a_command_that_is_no_wrapper_of_it_is_refused_with_its_last_words(wrap, call, told, capfd):
    wrap(call)
    assert run() == 1
    assert told in capfd.readouterr().err


def test_a_field_that_a_wrapped_trl_does_not_know_is_named(wrap, capfd):
    wrap(trainer="raise TypeError(\"SFTConfig.__init__() got an unexpected keyword argument 'too_new'\")")
    assert run() == 1
    assert "its TRL 0.17 does not know the field of training" in capfd.readouterr().err


def test_an_environment_that_lacks_an_import_is_told(install, capfd):
    home = install("echo started")
    (home / "trl.py").write_text("import no_such_module")
    assert run() == 1
    err = capfd.readouterr().err
    assert "cannot import what EasyDistill 1.0's trainer needs" in err and "No module named 'no_such_" in err


def logged(*lines):
    """Return what EasyDistill's command prints for its child's `lines`, and its exit code."""
    wrapped = [f"2026-01-02 03:04:05,678 - INFO - {line}" for line in lines]
    return "; ".join([*(f"echo '{line}'" for line in wrapped), "exit 0"])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (logged("ImportError: DeepSpeed is not installed => run it"), "starts processes with DeepSpeed"),
        (logged("RuntimeError: CUDA error: invalid device ordinal"), "fix its num_processes"),
        (
            logged("Traceback (most recent call last):", "ValueError: Tokenizer class X does not exist or"),
            "set tokenizer_class to PreTrainedTokenizerFast",
        ),
        (
            logged("has model type `x` but Transformers does not recognize this architecture."),
            "is older than the student's architecture",
        ),
        (
            logged("Retrying after a failed request"),
            'its log says "Retrying after a failed request": at a line',
        ),
        (
            logged("Traceback (most recent call last):", "    raise ValueError(", "ValueError: no sun"),
            'its log says "ValueError: no sun"',
        ),
    ],
)
def test_a_known_cause_is_explained_in_one_line(install, command, told, capfd):
    install(command)
    assert run() == 1
    assert told in next(x for x in capfd.readouterr().err.splitlines() if x.startswith("error: "))


def test_the_cause_of_a_trainer_that_died_alone_is_named(install, capfd):
    install(trainer="raise ValueError('no sun')", gpus=0)
    assert run() == 1
    assert 'easydistill: exit code 1; the cause is "ValueError: no sun"; it said:' in capfd.readouterr().err


def test_a_record_that_its_template_does_not_render_is_a_failure(install, capfd):
    """It would train on an empty text in its place."""
    install(trainer=f"print('WARNING:root:Error processing sample: no end')\n{SAVES}", gpus=0)
    assert run() == 1
    assert "does not render (Error processing sample: no end)" in capfd.readouterr().err
    assert not Path("models").exists()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"job_type": "kd_white_box"}, "job_type: found kd_white_box, where EasyDistill 1.0 learns from"),
        ({"job_type": "rl_ppo"}, "job_type: found 'rl_ppo', expected one of kd_black_box_local"),
        ({"lora": {"r": 8}}, "lora: EasyDistill 1.0 does not know it"),
        ({"peft": {"r": 8}}, "peft: unknown key; did you mean lora?"),
        ({"accelerate": "ddp"}, "accelerate: EasyDistill 1.0 does not know it"),
        ({"models": {"student": "x", "quantization": "4bit"}}, "models.quantization: EasyDistill 1.0"),
    ],
)
def test_what_it_cannot_do_is_refused_before_it_starts(install, sections, told, capfd):
    install("echo started")
    change_config(**sections)
    assert run() == 1
    err = capfd.readouterr().err
    assert told in err and "started" not in err and len(err.splitlines()) == 1


def test_without_a_backend_it_is_chosen_where_it_is_installed_and_can_do_the_job(install, monkeypatch):
    change_config(backend=None)
    job = read_job("configs/s1.json")
    install()
    assert choose_backend(job, None) == "easydistill"
    assert choose_backend(job.model_copy(update={"job_type": "kd_white_box"}), None) == "builtin"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert choose_backend(job, None) == "builtin"


@pytest.mark.full
@needs_easydistill
def test_the_real_easydistill_trains_a_student_that_learned(project, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join((str(ROOT / VENV / "bin"), os.environ["PATH"])))
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    write_config(tiny_model_dir, **options, num_train_epochs=4)
    assert run() == 0
    check_checkpoint("models/s1")
    _, tokenizer = load_student("models/s1")
    assert tokenizer.chat_template == chat_template("system1")
    loss = [float(x.split(",")[1]) for x in Path("models/s1/loss.csv").read_text().split()[1:]]
    assert len(loss) == 12 and loss[-1] < loss[0]
    assert not any(b"easydistill-" in p.read_bytes() for p in Path("models/s1").iterdir())


def test_a_pinned_student_of_the_hub_is_given_as_its_snapshot(tmp_path, tiny_model_dir, monkeypatch):
    """EasyDistill itself takes no revision."""
    asked = {}

    def snapshot_download(repo: str, revision: str) -> str:
        asked[repo] = revision
        return str(tiny_model_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    pinned, wrapper = Models(student="org/name", student_revision="a" * 40), real.Wrapper("easydistill")
    place = Path(real._student(pinned, wrapper, tmp_path))
    assert asked == {"org/name": "a" * 40}
    assert (place / "config.json").is_file() and place.is_relative_to(tmp_path) and not place.is_symlink()
    assert real._student(Models(student="org/name"), wrapper, tmp_path) == "org/name"

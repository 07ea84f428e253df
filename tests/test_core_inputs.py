"""Nothing local goes unseen: what a stage opens lies under its deps, or the stage says which line to add."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import dvc
from ruamel.yaml import YAML

from distill_app.core.inputs import read_inputs, require_deps
from distill_app.easydistill.run import named_inputs
from distill_app.profiles import SECTIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """The project's graph and params, in a folder with a home beside it."""
    folder = tmp_path / "my lab"
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


def change(section: str, **values: object) -> None:
    """Change params as a user does."""
    params = YAML(typ="safe").load(Path("params.yaml").read_text())
    params[section].update(values)
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)


def add_dep(stage: str, path: str) -> None:
    graph = YAML(typ="safe").load(Path("dvc.yaml").read_text())
    graph["stages"][stage]["deps"].append(path)
    with Path("dvc.yaml").open("w") as file:
        YAML(typ="safe").dump(graph, file)


def make(path: str) -> str:
    """Make a folder with a file in it, or a file where the name has a suffix."""
    place = Path(path)
    file = place if place.suffix else place / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    return path


# Stage, section, param, whether its value is a list
PARAMS = [
    ("base_models", "base_models", "teacher", False),
    ("prepare_s1", "prepare_s1", "dataset", False),
    ("prepare_s1", "prepare_s1", "tokenizer", False),
    ("prepare_s1", "prepare_s1", "benchmarks", True),
    ("prepare_s2", "prepare_s2", "dataset", False),
    ("prepare_s2", "prepare_s2", "tokenizer", False),
    ("label", "label", "teacher", False),
    ("measure", "label", "teacher", False),
    ("measure", "measure", "judge", False),
    ("measure", "measure", "teacher", False),
    ("measure", "train_s1", "student", False),
    ("measure", "train_s2", "student", False),
    ("benchmark", "benchmark", "task_dir", False),
    ("benchmark", "measure", "teacher", False),
    ("benchmark", "label", "teacher", False),
    ("benchmark", "train_s1", "student", False),
]


@pytest.mark.parametrize(("stage", "section", "key", "is_list"), PARAMS)
@pytest.mark.parametrize("path", ["mine/it", "bare"])
def test_a_local_path_that_no_dep_covers_ends_the_stage_with_the_line_to_add(
    lab, stage, section, key, is_list, path
):
    change(section, **{key: [make(path)] if is_list else make(path)})
    with pytest.raises(ValueError) as caught:
        read_inputs(stage, SECTIONS[section], section)
    assert str(caught.value) == (
        f"params.yaml: {section}.{key}: local, and no dep of stage {stage} covers it, so an edit would rerun"
        f" nothing; add to stages.{stage}.deps in dvc.yaml: - {path}"
    )
    add_dep(stage, path)
    read_inputs(stage, SECTIONS[section], section)


@pytest.mark.parametrize(
    "stage", ["prepare_s1", "prepare_s2", "label", "base_models", "benchmark", "measure"]
)
def test_the_default_project_passes(lab, stage):
    for path in (
        "data/sample/DistilQwen_100k",
        "data/sample/OmniThought",
        "data/tasks",
        "models/base/teacher",
    ):
        make(path)
    make("work/answers")  # label.store, which changes no output
    read_inputs(stage, SECTIONS[stage])


def test_a_checkpoint_that_a_stage_has_yet_to_make_is_asked_for_too(lab):
    """Else DVC may run the stage that reads it first."""
    change("prepare_s1", tokenizer="models/base/system1")
    with pytest.raises(ValueError, match=r"prepare_s1\.tokenizer: .*: - models/base/system1$"):
        read_inputs("prepare_s1", SECTIONS["prepare_s1"])


def test_a_path_that_is_not_there_is_left_to_the_one_who_reads_it(lab):
    change("label", teacher="models/none")
    assert read_inputs("label", SECTIONS["label"]).teacher == "models/none"


def test_several_paths_are_told_together(lab):
    change("measure", judge=make("a judge"), teacher=make("teachers/b"))
    with pytest.raises(ValueError, match=r"measure\.teacher, measure\.judge: .*: - teachers/b, - a judge$"):
        read_inputs("measure", SECTIONS["measure"])


def test_an_absolute_path_and_one_from_home_have_an_absolute_line(lab, tmp_path):
    for written in (str(tmp_path / "home/teacher"), "~/teacher"):
        make(str(tmp_path / "home/teacher"))
        change("label", teacher=written)
        with pytest.raises(ValueError, match=f": - {tmp_path}/home/teacher$"):
            read_inputs("label", SECTIONS["label"])
    add_dep("label", str(tmp_path / "home"))
    assert read_inputs("label", SECTIONS["label"]).teacher == str(tmp_path / "home/teacher")


@pytest.mark.parametrize(
    "written",
    ["data/tasks/", "./data/tasks", "data/../data/tasks", "{lab}/data/tasks", "data/tasks/maths", "linked"],
)
def test_a_dep_covers_what_lies_in_it_however_it_is_written(lab, written):
    make("data/tasks/maths")
    Path("linked").symlink_to("data/tasks")
    change("benchmark", task_dir=written.format(lab=lab))
    read_inputs("benchmark", SECTIONS["benchmark"])


@pytest.mark.parametrize("written", ["data", ".", "data/tasks2", ".."])
def test_a_dep_covers_neither_its_parents_nor_its_neighbours(lab, written):
    make("data/tasks")
    make("data/tasks2")
    change("benchmark", task_dir=written)
    with pytest.raises(ValueError, match=r"benchmark\.task_dir: local"):
        read_inputs("benchmark", SECTIONS["benchmark"])


def test_a_link_out_of_a_dep_is_seen_through_as_dvc_sees_it(lab, tmp_path):
    """DVC reads linked files in a dep and a dep that is a link, but enters no linked folder in a dep."""
    make("data/tasks")
    Path("data/tasks/file.json").symlink_to(make(str(tmp_path / "far/file.json")))
    change("benchmark", task_dir="data/tasks/file.json")
    read_inputs("benchmark", SECTIONS["benchmark"])
    Path("data/tasks/deep").symlink_to(tmp_path / "far")
    for written in ("data/tasks/deep", "data/tasks"):  # the folder, and the one that holds it
        change("benchmark", task_dir=written)
        with pytest.raises(ValueError, match=": - data/tasks/deep$"):
            read_inputs("benchmark", SECTIONS["benchmark"])
    add_dep("benchmark", "data/tasks/deep")
    read_inputs("benchmark", SECTIONS["benchmark"])


@pytest.mark.slow
def test_dvc_sees_links_as_the_check_supposes(tmp_path):
    make(str(tmp_path / "far/file.json"))
    folder = tmp_path / "lab"
    (folder / "files").mkdir(parents=True)
    (folder / "folders").mkdir()
    (folder / "files/file.json").symlink_to(tmp_path / "far/file.json")
    (folder / "folders/deep").symlink_to(tmp_path / "far")
    (folder / "top").symlink_to(tmp_path / "far")
    deps = {"a": "files", "b": "folders", "c": "folders/deep", "d": "top", "e": str(tmp_path / "far")}
    stages = {name: {"cmd": "true", "deps": [dep]} for name, dep in deps.items()}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "repro")
    (tmp_path / "far/file.json").write_text("[]")
    status = json.loads(dvc(folder, "status", "--json"))
    assert set(status) == {"a", "c", "d", "e"}


def test_a_hub_id_is_no_path_unless_a_folder_has_its_name(lab):
    change("label", teacher="org/name", engine="openai")  # no Hub is asked
    change("benchmark", task_dir="org/name")
    read_inputs("benchmark", SECTIONS["benchmark"])
    make("org/name")
    with pytest.raises(ValueError, match=": - org/name$"):
        read_inputs("benchmark", SECTIONS["benchmark"])


def test_what_only_names_something_is_no_path(lab):
    """An engine, a task, and a teacher behind a server, where folders have their names."""
    for name in ("transformers", "everyday", "models/qwen"):
        make(name)
    make("data/tasks")
    change("label", teacher="models/qwen", engine="openai")
    read_inputs("label", SECTIONS["label"])
    read_inputs("benchmark", SECTIONS["benchmark"])


def test_outside_a_project_and_for_a_stage_that_dvc_does_not_know_nothing_is_asked(lab):
    change("label", teacher=make("mine/it"))
    require_deps("other", "params.yaml", [("label.teacher", "mine/it")])
    Path("dvc.yaml").unlink()
    assert read_inputs("label", SECTIONS["label"]).teacher == "mine/it"


@pytest.mark.parametrize(
    ("key", "change_config"),
    [
        ("models.student", lambda config: config["models"].update(student=make("mine/student"))),
        ("accelerate", lambda config: config.update(accelerate=make("mine/fsdp.yaml"))),
        ("dataset.logits_path", lambda config: config["dataset"].update(logits_path=make("mine/x.arrow"))),
        ("dataset.labeled_path", lambda config: config["dataset"].update(labeled_path=make("mine/x.json"))),
    ],
)
def test_a_training_opens_nothing_that_its_stage_does_not_depend_on(lab, key, change_config):
    config = {
        "job_type": "kd_black_box_train_only",
        "dataset": {
            "labeled_path": make("data/train_labeled.json"),
            "template": make("configs/system1.jinja"),
        },
        "models": {"student": make("models/base/system1"), "teacher": make("models/base/teacher")},
        "training": {"output_dir": "models/system1"},
        "accelerate": "ddp",
    }
    Path("configs/system1.json").write_text(json.dumps(config))
    require_deps("train_s1", "configs/system1.json", named_inputs("configs/system1.json"))
    change_config(config)
    Path("configs/system1.json").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "stages.train_s1"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith(
        f"error: configs/system1.json: {key}: local, and no dep of stage train_s1 covers"
    )

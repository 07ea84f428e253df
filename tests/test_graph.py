"""What can be read off the tree without running it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distill_app.core.params import read_section
from distill_app.labeling.params import RUNTIME_ONLY, LabelParams
from distill_app.profiles import SECTIONS, check_profile, use_profile

ROOT = Path(__file__).parents[1]
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGE_MARKERS = {  # names and docstrings only
    "distill_app/__init__.py",
    "distill_app/evaluation/__init__.py",
    "distill_app/report/__init__.py",
    "stages/__init__.py",
}


def imported_files(path: Path, seen: set[Path]) -> set[Path]:
    """Return the project's files that a file imports, functions' bodies included, transitively."""
    if path in seen:
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            base = ROOT / name.replace(".", "/")
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file.is_file():
                    imported_files(file, seen)
    return seen


@pytest.mark.parametrize("stage", GRAPH)
def test_every_file_that_a_stage_imports_lies_under_its_deps(stage):
    start = {ROOT / f"stages/{stage}.py"}
    if stage.startswith("train_"):
        start.add(ROOT / "distill_app/training/__main__.py")
    files = set().union(*(imported_files(path, set()) for path in start))
    deps = [ROOT / dep for dep in GRAPH[stage]["deps"]]
    stray = {
        str(f.relative_to(ROOT)) for f in files if not any(f == d or d in f.parents for d in deps)
    } - PACKAGE_MARKERS
    assert stray == set()


def test_stage_script_and_entry_have_one_name():
    scripts = {p.stem for p in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert scripts == set(GRAPH)
    for name, stage in GRAPH.items():
        assert stage["cmd"] == f"exec python -m stages.{name}"


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))], ids=str)
def test_every_profile_is_what_the_code_reads(path):
    check_profile(path)
    assert set(yaml.safe_load(path.read_text())) == set(SECTIONS)


def test_the_default_profile_is_the_params_file():
    assert (ROOT / "profiles/default.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_the_production_profile_names_the_models_and_slices_of_the_contract():
    params = yaml.safe_load((ROOT / "profiles/qwen2.5.yaml").read_text())
    assert params["label"]["teacher"] == "Qwen/Qwen2.5-7B-Instruct"
    assert params["label"]["quantization"] == "8bit"
    assert params["label"]["engine"] == "vllm"
    assert params["train_s1"]["student"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert params["train_s2"]["student"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert (params["prepare_s1"]["slice"], params["prepare_s2"]["slice"]) == ("train[:1000]", "train[:2000]")


@pytest.mark.parametrize(
    "module",
    ["distill_app", "stages.prepare_s1", "stages.prepare_s2", "stages.write_config", "distill_app.cli"],
)
def test_what_needs_no_model_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_outside_git_edits_are_kept_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/default.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match="uncommitted edits would be lost"):
        use_profile("default")


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))], ids=str)
def test_a_local_path_in_the_params_is_a_dep_of_its_stage(path):
    """Else an edit of that folder would rerun nothing."""
    params = yaml.safe_load(path.read_text())
    readers = [
        ("prepare_s1", params["prepare_s1"]["dataset"]),
        ("prepare_s2", params["prepare_s2"]["dataset"]),
        ("label", params["label"]["teacher"]),
        ("score_s2", params["label"]["teacher"]),
        ("train_s1", params["train_s1"]["student"]),
        ("train_s2", params["train_s2"]["student"]),
        ("benchmark", params["benchmark"]["task_dir"]),
    ]
    for stage, value in readers:
        if value.startswith(("data/", "models/")):
            assert value in GRAPH[stage]["deps"]


def test_the_label_stage_reruns_for_every_param_that_can_change_an_answer_and_for_no_other():
    listed = {name.removeprefix("label.") for name in GRAPH["label"]["params"]}
    assert listed == set(LabelParams.model_fields) - RUNTIME_ONLY
    assert set(LabelParams.model_fields) >= RUNTIME_ONLY


def test_the_scoring_of_traces_reruns_for_what_it_reads_of_label_and_for_nothing_else():
    used = set(re.findall(r"\bparams\.(\w+)", (ROOT / "distill_app/labeling/logits.py").read_text()))
    listed = {name for name in GRAPH["score_s2"]["params"] if name.startswith("label")}
    assert listed == {f"label.{name}" for name in used - {"top_logits"} - RUNTIME_ONLY}


def test_labelling_does_not_depend_on_the_traces_of_system2():
    inputs = set(GRAPH["label"]["deps"])
    for stage in ("prepare_s2", "score_s2"):
        assert not inputs & set(GRAPH[stage]["outs"])


def test_the_measuring_reruns_for_the_params_that_name_the_teacher():
    labels = {name for name in GRAPH["measure"]["params"] if name.startswith("label")}
    assert labels == {
        f"label.{name}"
        for name in (
            "teacher",
            "revision",
            "engine",
            "base_url",
            "system_prompt",
            "temperature",
            "top_p",
            "seed",
        )
    }
    files = ("evaluation/asking/measure.py", "evaluation/asking/contender.py", "evaluation/candidates.py")
    used = "".join(ast.unparse(ast.parse((ROOT / "distill_app" / file).read_text())) for file in files)
    found = {f"label.{name}" for name in re.findall(r"\blabel\.(?!model_copy)(\w+)", used)}
    assert found - {"label.store"} == labels


def test_the_verdict_depends_on_no_model_code():
    """So a changed threshold or page asks no model."""
    files = {path.relative_to(ROOT).as_posix() for path in imported_files(ROOT / "stages/compare.py", set())}
    asking = ("distill_app/generation/", "distill_app/labeling/", "distill_app/evaluation/asking/")
    assert not [f for f in files if f.startswith(asking)]


def test_engines_know_no_store_no_labels_and_no_measures():
    """Else on-policy training could not use them, and what labels could not change without them."""
    for path in (ROOT / "distill_app/generation").glob("*.py"):
        files = {file.relative_to(ROOT).as_posix() for file in imported_files(path, set())}
        areas = ("distill_app/generation/", "distill_app/core/")
        assert not [f for f in files - PACKAGE_MARKERS if not f.startswith(areas)], path


def params_file(tmp_path: Path, **changes: object) -> Path:
    label = yaml.safe_load((ROOT / "params.yaml").read_text())["label"]
    label = {k: v for k, v in {**label, **changes}.items() if v != "MISSING"}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"label": label}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1}, r"label\.temprature: unknown key; did you mean temperature\?"),
        ({"seed": "MISSING"}, r"label\.seed: missing; add it"),
        ({"top_p": "most"}, r"label\.top_p: found 'most' \(str\): input should be a valid number"),
        ({"batch_size": 0}, r"label\.batch_size: found 0 \(int\): input should be greater"),
        ({"on_truncated": "shrug"}, r"label\.on_truncated: found 'shrug'"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_to_do(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_section("label", LabelParams, params_file(tmp_path, **changes))


def test_a_params_file_that_is_not_yaml_is_told(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("label: [1,\n")
    with pytest.raises(ValueError, match="not YAML"):
        read_section("label", LabelParams, path)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def committed(tmp_path, monkeypatch) -> Path:
    """A repository whose params are the default profile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").mkdir()
    for name in ("default", "qwen2.5"):
        (tmp_path / f"profiles/{name}.yaml").write_bytes((ROOT / f"profiles/{name}.yaml").read_bytes())
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def hide_by_skip_worktree(folder: Path) -> None:
    git(folder, "update-index", "--skip-worktree", "params.yaml")


def hide_by_assuming_unchanged(folder: Path) -> None:
    git(folder, "update-index", "--assume-unchanged", "params.yaml")


def hide_by_ignoring(folder: Path) -> None:
    (folder / ".gitignore").write_text("params.yaml\n")
    git(folder, "rm", "-q", "--cached", "params.yaml")
    git(folder, "commit", "-qam", "params are each one's own")


def hide_by_staging(folder: Path) -> None:
    (folder / "params.yaml").write_text("mine: 1\n")
    git(folder, "add", "params.yaml")


@pytest.mark.parametrize(
    "hide",
    [hide_by_skip_worktree, hide_by_assuming_unchanged, hide_by_ignoring, hide_by_staging],
    ids=lambda hide: hide.__name__,
)
def test_no_edit_is_lost_to_a_profile_however_git_is_told_to_look_away(committed, hide):
    hide(committed)
    (committed / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match="uncommitted edits would be lost; commit or undo them first"):
        use_profile("qwen2.5")
    assert (committed / "params.yaml").read_text() == "mine: 1\n"


def test_params_that_head_has_are_replaced_though_git_looks_away(committed):
    (committed / "params.yaml").write_text("mine: 1\n")
    git(committed, "commit", "-qam", "y")
    hide_by_skip_worktree(committed)
    use_profile("qwen2.5")
    assert (committed / "params.yaml").read_bytes() == (ROOT / "profiles/qwen2.5.yaml").read_bytes()


def test_a_profile_replaces_the_params_but_never_uncommitted_edits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").mkdir()
    for name in ("default", "qwen2.5"):
        (tmp_path / f"profiles/{name}.yaml").write_bytes((ROOT / f"profiles/{name}.yaml").read_bytes())
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    use_profile("qwen2.5")
    assert "7B" in (tmp_path / "params.yaml").read_text()
    git(tmp_path, "commit", "-qam", "y")
    (tmp_path / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match="uncommitted edits would be lost"):
        use_profile("default")
    assert (tmp_path / "params.yaml").read_text() == "mine: 1\n"
    (tmp_path / "params.yaml").unlink()
    use_profile("default")
    assert (tmp_path / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    use_profile("qwen2.5")  # an uncommitted profile is no edit of one's own
    with pytest.raises(FileNotFoundError, match="no such profile; there are: default, qwen2.5"):
        use_profile("llama")


def test_the_lock_pins_everything_for_cpu_and_gpu_alike():
    lock = (ROOT / "requirements.lock").read_text()
    pins = [line for line in lock.splitlines() if line and not line.lstrip().startswith("#")]
    assert all("==" in line for line in pins)
    assert "torch==2.13.0" in pins
    pins.remove("nvidia-ml-py==13.615.71")  # plain Python, for any machine
    assert not [line for line in pins if "nvidia" in line or "triton" in line or "+" in line or "//" in line]

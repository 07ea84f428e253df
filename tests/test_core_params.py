"""Params as DVC reads and writes them: YAML 1.2, whoever wrote the file."""

import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml
from pipeline import dvc, make_project

from distill_app.core.params import read_params, read_section, read_yaml, texts
from distill_app.easydistill.params import TrainParams
from distill_app.labeling.params import LabelParams
from distill_app.profiles import SECTIONS, check_profile

ROOT = Path(__file__).parents[1]
PROFILES = [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-05", 2e-5),
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("", None),
        ("  # nothing but a remark", None),
        ("~", None),
        ("null", None),
        ("017", 17),
        ("12:30", "12:30"),
        ("'2e-05'", "2e-05"),
    ],
)
def test_a_value_is_what_dvc_takes_it_for(tmp_path, written, value):
    path = tmp_path / "params.yaml"
    path.write_text(f"a:\n  b: {written}\n")
    assert read_params(path) == {"a": {"b": value}} == load_yaml(str(path))
    assert type(read_params(path)["a"]["b"]) is type(value)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.name)
def test_what_an_experiment_writes_is_read_back_with_that_change_alone(tmp_path, path):
    """DVC writes 2.0e-5 as 2e-05, and every null as nothing."""
    written = tmp_path / "params.yaml"
    written.write_bytes(path.read_bytes())
    apply_overrides(str(written), ["train_s1.learning_rate=2.0e-5", "label.ray_address=on"])
    text = written.read_text()
    assert "learning_rate: 2e-05\n" in text and "null" not in text.replace("null takes", "").split("#")[0]
    expected = read_params(path)
    expected["train_s1"]["learning_rate"], expected["label"]["ray_address"] = 2e-5, "on"
    assert read_params(written) == expected
    check_profile(written)
    assert read_section("train_s1", TrainParams, written).learning_rate == 2e-5


@pytest.mark.slow
def test_an_experiment_with_the_learning_rate_of_the_qwen_profile_runs(tmp_path, tiny_model_dir):
    project = make_project(tmp_path / "lab", tiny_model_dir)
    dvc(project, "exp", "run", "-S", "train_s1.learning_rate=2.0e-5", "write_config")
    assert '"learning_rate": 2e-05' in (project / "configs/system1.json").read_text()
    assert "learning_rate: 2e-05" in (project / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [1,\n", "not YAML: line 2, column 1: "),
        ("a: 1\na: 2\n", "not YAML: line 2, column 1: found duplicate key"),
        ("\ta: 1\n", "not YAML: line 1, column 1: found character"),
        ("a: 1\n---\nb: 2\n", "not YAML: "),
        ("a: !!python/object:os.system 1\n", "not YAML: line 1, column 4: "),
        ("- 1\n", "found list, expected sections of params"),
        ("", "found NoneType, expected sections of params"),
    ],
)
def test_a_file_that_holds_no_params_is_one_line(tmp_path, text, fault):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="params.yaml: ") as caught:
        read_params(path)
    assert str(caught.value).startswith(f"{path}: {fault}") and "\n" not in str(caught.value)
    assert "http" not in str(caught.value)  # ruamel.yaml's advice


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8; save the file as UTF-8"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        (
            "train_s1",
            "learning_rate: '5e-4'",
            r"learning_rate: found '5e-4' \(str\).*; write 5e-4 without quotes",
        ),
        ("prepare_s2", "verified_only: yes", r"verified_only: found 'yes' \(str\).*; write true or false"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_to_write(tmp_path, section, line, message):
    key = line.partition(":")[0]
    lines = (ROOT / "params.yaml").read_text().splitlines()
    changed = [f"  {line}" if text.startswith(f"  {key}:") else text for text in lines]
    (tmp_path / "params.yaml").write_text("\n".join(changed))
    with pytest.raises(ValueError, match=message):
        read_section(section, SECTIONS[section], tmp_path / "params.yaml")


def test_a_home_folder_is_written_as_a_shell_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ivan")
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("teacher: models/base/teacher", "teacher: ~/teacher").replace(
        "benchmarks: []", "benchmarks: [~/a.json]"
    )
    (tmp_path / "params.yaml").write_text(text)
    assert read_section("label", LabelParams, tmp_path / "params.yaml").teacher == "/home/ivan/teacher"
    section = read_section("prepare_s1", SECTIONS["prepare_s1"], tmp_path / "params.yaml")
    assert ("benchmarks", "/home/ivan/a.json") in list(texts(section))


def test_params_are_read_without_pyyaml():
    """Two readers with two sets of rules would be the old fault again."""
    code = "import sys; sys.modules['yaml'] = None; from distill_app.core.params import read_params; read_params()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

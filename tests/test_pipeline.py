"""The graph as a user runs it: real dvc, real stages, a tiny model; in a path with a space."""

import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pipeline import change_param, dvc, make_project, stages_run

STAGES = {
    "base_models",
    "prepare_s1",
    "label",
    "prepare_s2",
    "score_s2",
    "write_config",
    "train_s1",
    "train_s2",
    "refine_s1",
    "refine_s2",
    "benchmark",
    "measure",
    "compare",
}
JUDGED = {"benchmark", "measure", "compare"}  # what a new student reruns


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A project after its first `dvc repro`; do not change it."""
    folder = make_project(tmp_path_factory.mktemp("a project") / "my lab", tiny_model_dir)
    assert stages_run(dvc(folder, "repro")) == STAGES
    return folder


@pytest.fixture
def project(finished, tmp_path) -> Path:
    """A copy of the finished project, cache and all."""
    return Path(shutil.copytree(finished, tmp_path / "my lab", symlinks=True))


def test_the_first_run_leaves_all_that_the_graph_promises(finished):
    declared = yaml.safe_load((finished / "dvc.yaml").read_text())["stages"]
    for stage in declared.values():
        for kind in ("outs", "metrics", "plots"):
            for item in stage.get(kind, []):
                path = item if isinstance(item, str) else next(iter(item))
                assert (finished / path).exists(), path
    comparison = json.loads((finished / "reports/comparison.json").read_text())
    assert set(comparison["students"]) == {"system1", "system2"}
    assert "<html" in (finished / "reports/comparison.html").read_text()


def test_a_second_run_does_nothing(project):
    assert "Data and pipelines are up to date." in dvc(project, "repro")


def test_a_comment_in_the_params_reruns_nothing(project):
    path = project / "params.yaml"
    path.write_text("# a remark\n" + path.read_text())
    assert stages_run(dvc(project, "repro")) == set()


@pytest.mark.slow
def test_system2s_learning_rate_reruns_only_system2_and_is_named_in_the_diff(project):
    change_param(project, "train_s2", learning_rate=1.0e-3)
    assert "train_s2.learning_rate" in dvc(project, "params", "diff")
    assert stages_run(dvc(project, "repro")) == {"write_config", "train_s2", "refine_s2"} | JUDGED


@pytest.mark.slow
def test_other_traces_rerun_nothing_of_system1(project):
    change_param(project, "prepare_s2", slice="train[:38]")
    ran = stages_run(dvc(project, "repro", "train_s1", "train_s2"))
    assert ran == {"prepare_s2", "write_config", "score_s2", "train_s2"}


@pytest.mark.slow
def test_system2_learns_from_the_teachers_probabilities_too(project):
    change_param(project, "score_s2", top_logits=4)
    change_param(project, "train_s2", kd_ratio=0.5)
    assert stages_run(dvc(project, "repro", "train_s2")) == {"score_s2", "write_config", "train_s2"}
    origin = json.loads((project / "models/system2/provenance.json").read_text())
    found = origin["probabilities"]
    assert (found["path"], found["top"], found["kd_ratio"]) == ("data/traces_logits.arrow", 4, 0.5)
    assert found["teacher"] == "models/base/teacher"


@pytest.mark.slow
def test_a_student_refined_on_its_own_answers_is_judged_beside_itself_on_words(project):
    change_param(project, "refine_s1", steps=2, batch_size=2, max_new_tokens=4, on_policy=1.0)
    assert stages_run(dvc(project, "repro")) == {"refine_s1"} | JUDGED
    comparison = json.loads((project / "reports/comparison.json").read_text())
    models = {name: found["model"] for name, found in comparison["models"].items()}
    assert (models["system1"], models["system1_words"]) == ("models/refined/system1", "models/system1")
    assert models["system2"] == "models/system2" and "system2_words" not in models
    notes = comparison["students"]["system1"]["notes"]
    assert any("Refining it on its own answers changed that by" in note for note in notes)
    assert "System 1 on words" in (project / "reports/comparison.html").read_text()
    assert "on_policy" in (project / "reports/cards/system1.md").read_text()
    assert "Data and pipelines are up to date." in dvc(project, "repro")
    change_param(project, "refine_s1", steps=0)
    assert stages_run(dvc(project, "repro")) == {"refine_s1"}  # what follows lies in the cache


@pytest.mark.slow
def test_the_labelling_temperature_reruns_labels_and_system1(project):
    change_param(project, "label", temperature=0.7)
    assert stages_run(dvc(project, "repro")) == {"label", "train_s1", "refine_s1"} | JUDGED


def test_how_fast_and_where_the_teacher_is_asked_reruns_nothing(project):
    change_param(project, "label", batch_size=3, concurrency=2, store="work/other")
    assert stages_run(dvc(project, "repro")) == set()


def test_the_store_is_neither_tracked_nor_hashed(finished):
    assert (finished / "work/answers").is_dir() and (finished / "work/label.log").is_file()
    assert "work" not in (finished / "dvc.lock").read_text()
    command = ["git", "status", "--porcelain", "--", "work"]
    assert subprocess.run(command, cwd=finished, capture_output=True, text=True).stdout == ""


def test_labels_come_from_the_store_byte_for_byte(project):
    before = (project / "data/train_labeled.json").read_bytes()
    (project / "data/train_labeled.json").unlink()
    output = dvc(project, "repro", "--force", "--single-item", "label")
    assert "answers, " in output and " asked (" not in output
    assert (project / "data/train_labeled.json").read_bytes() == before


@pytest.mark.slow
def test_new_sample_data_of_system1_reruns_system1(project):
    path = project / "data/sample/DistilQwen_100k/data/train-00000-of-00001.parquet"
    table = pq.read_table(path)
    new = pa.table({"instruction": ["Name a quiet place."], "output": ["A library."]})
    pq.write_table(pa.concat_tables([new.cast(table.schema), table]), path)
    ran = stages_run(dvc(project, "repro"))
    assert ran == {"prepare_s1", "label", "write_config", "train_s1", "refine_s1"} | JUDGED


@pytest.mark.slow
def test_comparison_code_reruns_compare_alone(project):
    path = project / "distill_app/report/console.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    assert stages_run(dvc(project, "repro")) == {"compare"}


def change_targets(project: Path, **values: float) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    change_param(project, "compare", system1={**params["compare"]["system1"], **values})


@pytest.mark.slow
def test_a_threshold_asks_no_model(project):
    change_targets(project, min_speedup=1.5)
    assert stages_run(dvc(project, "repro")) == {"compare"}


@pytest.mark.slow
def test_a_missed_threshold_can_fail_the_run_and_leaves_its_report_to_read(project):
    change_targets(project, min_speedup=1000.0)
    change_param(project, "compare", fail_below=True)
    output = dvc(project, "repro", ok=False)
    assert "System 1: Speed-up is" in output and "the target is 1000.00×" in output
    assert "target 1000×" in (project / "reports/comparison.md").read_text()


@pytest.mark.slow
def test_system2_alone_runs_nothing_of_system1(project):
    change_param(project, "train_s1", learning_rate=1.0e-3)
    change_param(project, "train_s2", learning_rate=1.0e-3)
    assert stages_run(dvc(project, "repro", "train_s2")) == {"write_config", "train_s2"}


@pytest.mark.slow
def test_metrics_and_plots_show_what_was_measured(project):
    metrics = dvc(project, "metrics", "show")
    assert "reports/scores.json" in metrics and "system2.multi_step" in metrics
    plots = dvc(project, "plots", "show", "--json")
    for name in ("metrics/train_s1_loss.csv", "metrics/train_s2_validation.csv", "reports/scores.csv"):
        assert name in plots


def test_nothing_tracked_tells_time_or_place(finished):
    tracked = [
        p
        for kind in ("data/*.json", "configs/*", "metrics/*", "models/**/*.json")
        for p in finished.glob(kind)
    ]
    assert len(tracked) > 20
    for path in tracked:
        assert str(finished) not in path.read_text(), path
    assert not list(finished.glob("models/**/*.bin")) and not list(finished.glob("models/**/*.pt"))


@pytest.mark.parametrize(
    ("section", "values", "stage", "message"),
    [
        ("prepare_s1", {"slice": "train[:0]"}, "prepare_s1", "train[:0]"),
        ("prepare_s2", {"slice": "banana"}, "prepare_s2", "banana"),
        ("prepare_s1", {"heldout_fraction": 0.0}, "prepare_s1", "heldout_fraction: found 0.0"),
        ("prepare_s1", {"dataset": "data/none"}, "prepare_s1", "data/none"),
        ("label", {"teacher": "models/none"}, "label", "models/none: no such model folder"),
        ("label", {"temprature": 1, "seed": 18}, "label", "unknown key; did you mean temperature?"),
        ("train_s2", {"learning_rate": "fast"}, "write_config", "learning_rate: found 'fast' (str)"),
        pytest.param(
            "train_s1",
            {"student": "models/none"},
            "train_s1",
            "models/none: no such model folder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_params_fail_in_one_line_and_leave_no_output(project, section, values, stage, message):
    change_param(project, section, **values)
    output = dvc(project, "repro", stage, ok=False)
    line = next(line for line in output.splitlines() if line.startswith("error:"))
    assert message in output and "Traceback" not in output
    assert stage.startswith("train_") or message in line
    declared = yaml.safe_load((project / "dvc.yaml").read_text())["stages"][stage]["outs"]
    for path in declared:
        assert not (project / path).exists()


@pytest.mark.slow
def test_malformed_data_fails_the_stage_that_reads_it(project):
    (project / "data/train_labeled.json").write_text('[{"instruction": "a", "input": ""}]')
    output = dvc(project, "repro", "--single-item", "train_s1", ok=False)
    assert 'record 0 has no "output"' in output
    assert not (project / "models/system1").exists()


@pytest.mark.full
def test_two_clones_give_the_same_hashes_for_all_but_the_reports(finished, tmp_path, tiny_model_dir):
    other = make_project(tmp_path / "elsewhere", tiny_model_dir)
    dvc(other, "repro")
    locks = [yaml.safe_load((p / "dvc.lock").read_text())["stages"] for p in (finished, other)]
    for stage in STAGES - {"measure", "compare"}:
        assert locks[0][stage]["outs"] == locks[1][stage]["outs"]

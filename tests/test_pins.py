"""What is read of the Hub is held at a commit: by `distill pin`, or for one run, which says so."""

import difflib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_model
from dvc.utils.hydra import apply_overrides
from hubs import Hub, Repo, a_hub, commit, run
from safetensors.torch import load_file
from trainings import write_job

from distill_app.core.params import read_params

ROOT = Path(__file__).parents[1]
A, B, C = commit("a"), commit("b"), commit("c")
QWEN = {
    "datasets/alibaba-pai/DistilQwen_100k": A,
    "datasets/alibaba-pai/OmniThought": B,
    "models/Qwen/Qwen2.5-7B-Instruct": C,
    "models/Qwen/Qwen2.5-0.5B-Instruct": commit("d"),
    "models/Qwen/Qwen2.5-1.5B-Instruct": commit("e"),
}
PINNED = [
    ("prepare_s1.dataset", "alibaba-pai/DistilQwen_100k", A),
    ("label.teacher", "Qwen/Qwen2.5-7B-Instruct", C),
    ("prepare_s2.dataset", "alibaba-pai/OmniThought", B),
    ("train_s1.student", "Qwen/Qwen2.5-0.5B-Instruct", commit("d")),
    ("train_s2.student", "Qwen/Qwen2.5-1.5B-Instruct", commit("e")),
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with a_hub() as served:
        served.repos = {name: Repo({"main": sha}) for name, sha in QWEN.items()}
        yield served


@pytest.fixture
def lab(tmp_path) -> Path:
    """A folder with the production profile for its params."""
    shutil.copy(ROOT / "profiles/qwen2.5.yaml", tmp_path / "params.yaml")
    return tmp_path


def changed_lines(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in lines if line.startswith(("+ ", "- "))]


def write_metrics(lab: Path, commits: dict[str, str]) -> None:
    """Stand in for both prepare stages."""
    (lab / "metrics").mkdir()
    for name in ("prepare_s1", "prepare_s2"):
        (lab / f"metrics/{name}.json").write_text(json.dumps({"commits": commits}))


def with_revision(text: str, name: str, revision: str) -> str:
    """Return params in which what is read by that name has a revision in place of null, and nothing else."""
    found, count = re.subn(rf"({name}[^\n]*\n  revision: )null", rf"\g<1>{revision}", text)
    assert count == 1
    return found


def test_without_names_it_shows_what_is_not_pinned_and_writes_nothing(hub, lab):
    before = (lab / "params.yaml").read_bytes()
    shown = run(hub, lab, "distill_app", "pin")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        f"{name}: {repo}: not pinned; main is now {sha}" for name, repo, sha in PINNED
    ]
    assert (lab / "params.yaml").read_bytes() == before


@pytest.mark.slow
def test_all_is_pinned_and_every_other_byte_stays(hub, lab):
    before = (lab / "params.yaml").read_text()
    done = run(hub, lab, "distill_app", "pin", "--all")
    assert done.stdout.splitlines() == [
        f"{name}: {repo}: pinned at {sha}, was null" for name, repo, sha in PINNED
    ]
    after = (lab / "params.yaml").read_text()
    expected = before
    for _, repo, sha in PINNED:
        expected = with_revision(expected, repo, sha)
    assert after == expected
    assert len(changed_lines(before, after)) == 10
    shown = run(hub, lab, "distill_app", "pin")
    assert shown.stdout.splitlines() == [f"{name}: {repo}: pinned at {sha}" for name, repo, sha in PINNED]


@pytest.mark.slow
def test_a_branch_that_moved_is_shown_and_only_the_named_pin_moves(hub, lab):
    run(hub, lab, "distill_app", "pin", "--all")
    hub.repos["models/Qwen/Qwen2.5-7B-Instruct"].refs["main"] = commit("f")
    hub.repos["datasets/alibaba-pai/OmniThought"].refs["main"] = commit("9")
    shown = run(hub, lab, "distill_app", "pin").stdout.splitlines()
    assert shown[1] == f"label.teacher: Qwen/Qwen2.5-7B-Instruct: main is now {commit('f')}, pinned is {C}"
    before = (lab / "params.yaml").read_text()
    moved = run(hub, lab, "distill_app", "pin", "label.teacher")
    assert moved.stdout == f"label.teacher: Qwen/Qwen2.5-7B-Instruct: pinned at {commit('f')}, was {C}\n"
    assert changed_lines(before, (lab / "params.yaml").read_text()) == [
        f"-   revision: {C}",
        f"+   revision: {commit('f')}",
    ]
    run(hub, lab, "distill_app", "pin", "prepare_s2")  # all of a section; digits alone stay text
    assert read_params(lab / "params.yaml")["prepare_s2"]["revision"] == commit("9")


@pytest.mark.slow
def test_a_tag_is_pinned_to_its_commit(hub, lab):
    hub.repos["datasets/alibaba-pai/OmniThought"].refs["v1"] = C
    path = lab / "params.yaml"
    path.write_text(with_revision(path.read_text(), "OmniThought", "'v1'"))
    assert f"OmniThought: not pinned; v1 is now {C}\n" in run(hub, lab, "distill_app", "pin").stdout
    done = run(hub, lab, "distill_app", "pin", "prepare_s2.dataset")
    assert done.stdout == f"prepare_s2.dataset: alibaba-pai/OmniThought: pinned at {C}, was v1\n"
    assert read_params(path)["prepare_s2"]["revision"] == C


def test_what_dvc_has_rewritten_is_pinned_as_well(hub, lab):
    """Its nulls are empty values, with a remark behind them or none."""
    path = lab / "params.yaml"
    apply_overrides(str(path), ["train_s1.seed=3"])
    before = path.read_text()
    assert "null" not in "".join(line.partition("#")[0] for line in before.splitlines())
    run(hub, lab, "distill_app", "pin", "--all")
    assert len(changed_lines(before, path.read_text())) == 10
    params = read_params(path)
    assert [params[name.partition(".")[0]]["revision"] for name, *_ in PINNED] == [sha for *_, sha in PINNED]
    assert params["base_models"]["teacher"] is None


def test_a_revision_that_others_refer_to_is_left_alone(hub, lab):
    path = lab / "params.yaml"
    text = with_revision(path.read_text(), "7B-Instruct", "&none null")
    path.write_text(with_revision(text, "OmniThought", "*none"))
    before = path.read_bytes()
    done = run(hub, lab, "distill_app", "pin", "label")
    assert done.returncode == 1 and path.read_bytes() == before
    assert done.stderr.endswith(f"cannot be replaced alone; write them yourself: label.teacher {C}\n")


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_line_ends_and_quotes_of_others_stay(hub, lab, end):
    path = lab / "params.yaml"
    text = path.read_text().replace("8bit", '"8bit"').replace("\n", end)
    path.write_bytes(text.encode())
    run(hub, lab, "distill_app", "pin", "label")
    assert path.read_bytes() == with_revision(text, "7B-Instruct", C).encode()


def test_judge_and_measured_teacher_are_pinned_by_their_own_revisions(hub, lab):
    path = lab / "params.yaml"
    text = path.read_text().replace("  judge: null", "  judge: Qwen/Qwen2.5-1.5B-Instruct")
    path.write_text(
        text.replace("measure:\n  teacher: null", "measure:\n  teacher: Qwen/Qwen2.5-7B-Instruct")
    )
    run(hub, lab, "distill_app", "pin", "measure")
    measure = read_params(path)["measure"]
    assert (measure["judge_revision"], measure["teacher_revision"]) == (commit("e"), C)
    assert read_params(path)["label"]["revision"] is None


def test_the_tokenizer_that_counts_is_pinned_and_read_at_its_commit(hub, lab, tmp_path):
    """The branch has another tokenizer by then."""
    tiny_repo(hub, tmp_path)
    rows = [{"instruction": f"Say {n}", "output": "one"} for n in range(40)]
    (lab / "rows.json").write_text(json.dumps(rows))
    text = (ROOT / "params.yaml").read_text().replace("data/sample/DistilQwen_100k", "rows.json")
    (lab / "params.yaml").write_text(text.replace("tokenizer: null", "tokenizer: owner/tiny", 1))
    done = run(hub, lab, "distill_app", "pin", "prepare_s1")
    assert done.stdout == f"prepare_s1.tokenizer: owner/tiny: pinned at {B}, was null\n"
    hub.repos["models/owner/tiny"].refs["main"] = A
    done = run(hub, lab, "stages.prepare_s1")
    assert done.returncode == 0 and "pinned" not in done.stderr, done.stderr
    tokens = json.loads((lab / "metrics/prepare_s1.json").read_text())["tokens"]
    assert tokens["counted_by"] == f"owner/tiny@{B}"
    assert not any("resolve/main/tokenizer.json" in asked for asked in hub.asked)


def test_servers_names_and_local_folders_are_no_repositories(hub, lab):
    path = lab / "params.yaml"
    text = path.read_text().replace("  engine: vllm", "  engine: openai", 1)
    assert "engine: openai" in text
    path.write_text(text.replace("dataset: alibaba-pai/OmniThought", "dataset: data/mine"))
    (lab / "data/mine").mkdir(parents=True)
    shown = run(hub, lab, "distill_app", "pin").stdout
    assert [line.partition(":")[0] for line in shown.splitlines()] == [
        "prepare_s1.dataset",
        "train_s1.student",
        "train_s2.student",
    ]


def test_a_profile_can_be_pinned_for_good(hub, lab):
    shutil.copy(lab / "params.yaml", lab / "qwen.yaml")
    run(hub, lab, "distill_app", "pin", "--all", "--params", "qwen.yaml")
    assert read_params(lab / "qwen.yaml")["label"]["revision"] == C
    assert read_params(lab / "params.yaml")["label"]["revision"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["label.store"],
            "params.yaml: label.store: no input from the Hub; expected one of: prepare_s1.dataset,",
        ),
        (["--all", "label"], "pin: found --all and names, expected one of both"),
        (["--params", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_a_wrong_call_is_one_line(hub, lab, arguments, message):
    done = run(hub, lab, "distill_app", "pin", *arguments)
    assert (
        done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_what_the_hub_does_not_say_is_told_and_pins_nothing(hub, lab):
    before = (lab / "params.yaml").read_bytes()
    del hub.repos["models/Qwen/Qwen2.5-7B-Instruct"]
    shown = run(hub, lab, "distill_app", "pin").stdout.splitlines()
    assert (
        shown[1].startswith("label.teacher: Qwen/Qwen2.5-7B-Instruct: not pinned; ")
        and "HF_TOKEN" in shown[1]
    )
    assert shown[0].endswith(f"main is now {A}")
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(hub, lab, "distill_app", "pin", "--all", **environment)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.endswith("; nothing is pinned\n")
        assert (lab / "params.yaml").read_bytes() == before


def tiny_repo(hub: Hub, folder: Path) -> tuple[Path, Path]:
    """Serve owner/tiny, whose branch has gone from A to B; return the folders of both students' weights."""
    old, new = (make_tiny_model(folder / name, seed=seed) for seed, name in enumerate(("old", "new")))
    files = {
        sha: {path.name: path.read_bytes() for path in place.iterdir()} for sha, place in ((A, old), (B, new))
    }
    hub.repos["models/owner/tiny"] = Repo({"main": B}, files)
    return old, new


def rows(text: str) -> bytes:
    file = io.BytesIO()
    names = [f"{text} {number}, say it in other words" for number in range(40)]
    pq.write_table(pa.table({"instruction": names, "output": names}), file)
    return file.getvalue()


@pytest.fixture
def small(hub, lab) -> Path:
    """A lab whose System 1 reads a Hub dataset of 40 rows."""
    files = {sha: {"data/train-00000-of-00001.parquet": rows(text)} for sha, text in ((A, "Old"), (B, "New"))}
    hub.repos["datasets/owner/set"] = Repo({"main": A}, files)
    text = (ROOT / "params.yaml").read_text().replace("data/sample/DistilQwen_100k", "owner/set")
    (lab / "params.yaml").write_text(text.replace("train[:380]", "train"))
    return lab


def read_word(lab: Path) -> str:
    return str(json.loads((lab / "data/train_instructions.json").read_text())[0]["instruction"]).split()[0]


@pytest.mark.slow
def test_a_stage_says_which_commit_of_a_branch_it_reads(hub, small):
    done = run(hub, small, "stages.prepare_s1")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "pinned" in line]
    assert told == [
        f"prepare_s1: prepare_s1.dataset: owner/set is not pinned; this run reads main at {A}"
        " (distill pin prepare_s1.dataset pins it)"
    ]
    assert read_word(small) == "Old"


@pytest.mark.slow
def test_a_pinned_stage_reads_its_commit_after_the_branch_moved_and_says_nothing(hub, small):
    assert run(hub, small, "distill_app", "pin", "--all").returncode == 0
    hub.repos["datasets/owner/set"].refs["main"] = B
    done = run(hub, small, "stages.prepare_s1")
    assert done.returncode == 0 and "pinned" not in done.stderr, done.stderr
    assert read_word(small) == "Old"


@pytest.mark.slow
def test_a_branch_that_moved_since_the_last_run_is_told(hub, small):
    run(hub, small, "stages.prepare_s1")
    hub.repos["datasets/owner/set"].refs["main"] = B
    done = run(hub, small, "stages.prepare_s1")
    assert f"this run reads main at {B}, which was {A} before (distill pin" in done.stderr
    assert read_word(small) == "New"


@pytest.mark.slow
def test_offline_a_branch_is_the_commit_that_the_cache_knows(hub, small):
    (small / "ask.py").write_text(
        "from distill_app.core.hub import find_commit; print(*find_commit('owner/set', None, 'dataset'))"
    )
    assert "its commit is not known" in run(hub, small, "ask", HF_HUB_OFFLINE="1").stderr
    assert run(hub, small, "ask").stdout == f"{A} None\n"
    hub.repos["datasets/owner/set"].refs["main"] = B
    assert run(hub, small, "ask", HF_HUB_OFFLINE="1").stdout == f"{A} {A}\n"
    assert run(hub, small, "ask").stdout == f"{B} {A}\n"


@pytest.mark.slow
def test_the_students_commit_goes_into_the_config_that_trains_it(hub, lab):
    write_metrics(lab, {"alibaba-pai/OmniThought": B})
    done = run(hub, lab, "stages.write_config")
    assert done.returncode == 0, done.stderr
    models = [json.loads((lab / f"configs/system{n}.json").read_text())["models"] for n in (1, 2)]
    assert [one["student_revision"] for one in models] == [commit("d"), commit("e")]
    assert done.stderr.count("is not pinned; this run reads") == 2
    sources = [json.loads((lab / f"configs/system{n}.json").read_text())["source"] for n in (1, 2)]
    assert sources == ["alibaba-pai/DistilQwen_100k", f"alibaba-pai/OmniThought@{B}"]


@pytest.mark.slow
def test_without_the_hub_the_config_is_written_and_says_that_it_is_not_pinned(hub, lab):
    write_metrics(lab, {})
    done = run(hub, lab, "stages.write_config", HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    assert (
        done.stderr.count("train_s1.student: not pinned: Qwen/Qwen2.5-0.5B-Instruct: its commit is not known")
        == 1
    )
    assert "student_revision" not in (lab / "configs/system1.json").read_text()


@pytest.mark.parametrize("sections", [{}, pytest.param({"lora": {"r": 4}}, marks=pytest.mark.slow)])
def test_a_student_is_trained_from_its_commit_and_says_so(hub, tmp_path, monkeypatch, sections):
    """The branch is a student of other weights by then; without steps worth the name the old ones stay."""
    old, new = tiny_repo(hub, tmp_path)
    monkeypatch.chdir(tmp_path)
    pinned = {"models": {"student_revision": A}, **sections}
    config = write_job("owner/tiny", sections=pinned, learning_rate=1e-12, num_train_epochs=1)
    done = run(hub, tmp_path, "distill_app.training", "--config", config)
    assert done.returncode == 0, done.stderr
    origin = json.loads((tmp_path / "models/s1/provenance.json").read_text())
    assert (origin["student"]["model"], origin["student"]["commit"]) == ("owner/tiny", A)
    assert A in (tmp_path / "models/s1/README.md").read_text()
    trained, start, other = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "models/s1", old, new)
    )
    assert all(torch.equal(trained[name], start[name]) for name in start)
    assert not all(torch.equal(trained[name], other[name]) for name in start)
    of_the_branch = [
        asked for asked in hub.asked if "resolve/main/" in asked
    ]  # PEFT asks for its config.json
    assert not any(asked.endswith((".safetensors", "tokenizer.json")) for asked in of_the_branch)


@pytest.mark.slow
def test_the_teachers_commit_is_told_and_stands_in_the_labels_metrics(hub, lab):
    tiny_repo(hub, lab)
    text = (ROOT / "params.yaml").read_text().replace("teacher: models/base/teacher", "teacher: owner/tiny")
    (lab / "params.yaml").write_text(
        text.replace("max_new_tokens: 96", "max_new_tokens: 4").replace(
            "on_truncated: drop", "on_truncated: keep"
        )
    )
    (lab / "data").mkdir()
    for name in ("train_instructions", "heldout_s1"):
        (lab / f"data/{name}.json").write_text('[{"instruction": "Say 1", "input": "", "output": ""}]')
    done = run(hub, lab, "stages.label")
    assert done.returncode == 0, done.stderr
    assert (
        f"label: label.teacher: owner/tiny is not pinned; this run reads main at {B} (distill" in done.stderr
    )
    metrics = json.loads((lab / "metrics/label.json").read_text())
    assert metrics["commits"] == {"label.teacher": f"owner/tiny@{B}"}
    run(hub, lab, "distill_app", "pin", "label")
    assert run(hub, lab, "stages.label").stderr.count("pinned") == 0

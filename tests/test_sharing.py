"""docs/sharing.md: every command, on real remotes over loopback.

The graph is the project's own; stand-ins that take no time write what its stages would.
"""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from remotes import KEY_ID, SECRET, Person, a_folder, a_hub, on_s3, over_ssh

PAGE = ROOT / "docs/sharing.md"
SHARE, COMPARE, PUBLISH = "Share through a remote", "Compare experiments", "Publish a student"
FIRST_LINES = {a_folder: "/mnt/team", over_ssh: "ssh://", on_s3: "s3://"}
STAND_IN = """
import hashlib, json, pathlib, yaml
STAGE = {stage!r}
params = yaml.safe_load(open("params.yaml"))
used = [params[name.split(".")[0]] for name in STAGE.get("params", [])]
for dep in map(pathlib.Path, STAGE["deps"]):
    files = sorted(dep.rglob("*")) if dep.is_dir() else [dep]
    used += [path.read_bytes().hex() for path in files if path.is_file()]
digest = hashlib.sha256(json.dumps(used).encode()).hexdigest()
loss = int(digest[:4], 16) / 65536
for kind in ("outs", "metrics", "plots"):
    for item in STAGE.get(kind, []):
        name, options = (item, {{}}) if isinstance(item, str) else next(iter(item.items()))
        path = pathlib.Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "metrics":
            path.write_text(json.dumps({{"loss": loss}}))
        elif kind == "plots":
            path.write_text(f"{{options['x']}},{{options['y']}}\\n1,{{loss}}\\n")
        elif path.suffix:
            path.write_text(f"{{name}} {{digest}}")
        else:
            path.mkdir(exist_ok=True)
            for file in ("model.safetensors", "README.md", "system1.md"):
                (path / file).write_text(f"---\\ntags: [distillation]\\n---\\n{{name}} {{digest}}\\n")
"""


def blocks(section: str) -> list[list[str]]:
    """Return the commands of a section, one list a code block, without their comments."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [[line.split("   #")[0].strip() for line in block.strip().split("\n")] for block in found]


def block(section: str, word: str) -> list[str]:
    """Return the section's first block of commands that has a word in it."""
    return next(commands for commands in blocks(section) if word in "\n".join(commands))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `lab`, a clone of `lab.git`, both with a finished run; do not change them."""
    folder = tmp_path_factory.mktemp("share")
    lab, ivan = make_lab(folder / "lab"), Person(folder / "home")
    ivan.run("git init -q && dvc init -q", lab)
    shutil.copy(ROOT / ".dvc/config", lab / ".dvc/config")
    ivan.run("git add -A && git commit -qm 'The graph' && dvc repro -q", lab)
    ivan.run("git add -A && git commit -qm 'One run'", lab)
    ivan.run(f"git clone -q --bare . {folder}/lab.git && git remote add origin {folder}/lab.git", lab)
    ivan.run("git fetch -q && git branch -q --set-upstream-to origin/$(git branch --show-current)", lab)
    return folder


def make_lab(folder: Path) -> Path:
    """Write the project's graph and params, with stand-ins for its stages and for what they depend on."""
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made = {
        item if isinstance(item, str) else next(iter(item))
        for stage in stages.values()
        for kind in ("outs", "metrics", "plots")
        for item in stage.get(kind, [])
    }
    deps = {dep for stage in stages.values() for dep in stage["deps"]} - made
    for dep in deps:
        path = folder / dep if Path(dep).suffix else folder / dep / "code.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {dep}\n")
    for name, stage in stages.items():
        (folder / "stages" / f"{name}.py").write_text(STAND_IN.format(stage=stage))
    return folder


@pytest.fixture
def place(finished, tmp_path) -> Path:
    """A folder with a copy of `lab` and of `lab.git`, for one test to change."""
    for name in ("lab", "lab.git"):
        shutil.copytree(finished / name, tmp_path / name, symlinks=True)
    command = ["git", "remote", "set-url", "origin", tmp_path / "lab.git"]
    subprocess.run(command, cwd=tmp_path / "lab", check=True)
    return tmp_path


def share(place: Path, ivan: Person, names: dict[str, str], kind=a_folder) -> None:
    """Run the page's commands for a remote of a kind and for the push, with other names in them."""
    for command in [*block(SHARE, FIRST_LINES[kind]), *block(SHARE, "dvc push")]:
        for name, here in names.items():
            command = command.replace(name, here)
        ivan.run(command, place / "lab")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "kind", [a_folder, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (over_ssh, on_s3))]
)
def test_a_colleague_pulls_one_student_and_has_nothing_to_run(place, kind):
    lab, clone = place / "lab", place / "clone"
    with kind(place) as (ivan, names):
        share(place, ivan, names, kind)
        ivan.run("git clone -q lab.git clone", place)
        pull, repro = block(SHARE, "dvc pull models/system1")
        ivan.run(pull, clone)
        assert files_of(clone / "models/system1") == files_of(lab / "models/system1")
        assert not (clone / "models/system2").exists()
        output = ivan.run(repro, clone)
        assert "Running stage" not in output and "up to date" in output
        assert_no_secrets(ivan, lab, clone)


def assert_no_secrets(ivan: Person, *folders: Path) -> None:
    secrets = [SECRET, KEY_ID, "PRIVATE KEY", str(ivan.home)]
    for folder in folders:
        tracked = ivan.run("git ls-files", folder).split()
        assert ".dvc/config" in tracked and ".dvc/config.local" not in tracked
        for name in tracked:
            text = (folder / name).read_bytes()
            assert not [secret for secret in secrets if secret.encode() in text], name


def test_a_secret_of_the_projects_own_stays_out_of_git(place):
    lab, ivan = place / "lab", Person(place / "home")
    ivan.run(block(SHARE, "s3://")[0], lab)
    text = PAGE.read_text()
    (command,) = re.findall(r"`(dvc remote modify --local team secret_access_key) \.\.\.`", text)
    ivan.run(f"{command} {SECRET} && git add -A", lab)
    assert SECRET in (lab / ".dvc/config.local").read_text()
    assert_no_secrets(ivan, lab)


@pytest.mark.slow
def test_a_damaged_object_is_an_error_and_no_checkpoint(place):
    lab, clone = place / "lab", place / "clone"
    with a_folder(place) as (ivan, names):
        share(place, ivan, names)
        ivan.run("git clone -q lab.git clone", place)
        weights = hashlib.md5((lab / "models/system2/model.safetensors").read_bytes()).hexdigest()
        path = place / "store/files/md5" / weights[:2] / weights[2:]
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
        output = ivan.run("dvc pull models/system2", clone, ok=False)
        assert "failed to pull data from the cloud" in output and "models/system2" in output
        assert not (clone / "models/system2/model.safetensors").exists()


@pytest.mark.slow
def test_an_older_checkpoint_stands_beside_the_new_or_in_its_place(place):
    lab, ivan = place / "lab", Person(place / "home")
    old = files_of(lab / "models/system1")
    edit = "sed -i 's/^  learning_rate: .*/  learning_rate: 1.0e-3/' params.yaml"
    ivan.run(f"{edit} && dvc repro -q && git commit -qam 'Faster'", lab)
    new = files_of(lab / "models/system1")
    assert new != old
    get, *go_back = block(SHARE, "dvc get")
    ivan.run(get, lab)
    assert files_of(lab / "work/older") == old and files_of(lab / "models/system1") == new
    found = []
    for command in go_back:
        ivan.run(command, lab)
        found.append(files_of(lab / "models/system1"))
    assert found == [new, old, old, new]


@pytest.mark.full
def test_experiments_stand_side_by_side_and_one_is_kept(place):
    lab = place / "lab"
    before = (lab / "params.yaml").read_bytes()
    with a_folder(place) as (ivan, names):
        share(place, ivan, names)
        two, queue, keep = blocks(COMPARE)
        said = {command: ivan.run(command, lab) for command in two}
        differing = said["dvc params diff gentle twice"]
        assert "train_s1.learning_rate" in differing and "train_s1.num_epochs" in differing
        assert differing.count("params.yaml") == 2
        assert "reports/scores.json" in said["dvc metrics diff gentle twice"]
        page = (lab / "dvc_plots/index.html").read_text()
        assert '"rev": "gentle"' in page and "metrics_train_s1_loss_csv" in page
        table = [ivan.run(command, lab) for command in queue][-1]
        assert table.count("├──") + table.count("└──") == 4
        assert "train_s2.learning_rate" in table and "models/system1" not in table
        assert (lab / "params.yaml").read_bytes() == before and not ivan.run("git status --short", lab)
        for command in keep:
            ivan.run(command, lab)
        assert yaml.safe_load((lab / "params.yaml").read_text())["train_s1"]["learning_rate"] == 1e-4
        assert "No experiments" in ivan.run("dvc exp list --all-commits; echo No experiments", lab)
        assert "up to date" in ivan.run("dvc repro", lab)


@pytest.mark.slow
def test_a_tagged_student_is_fetched_without_a_clone(place):
    with a_folder(place) as (ivan, names):
        share(place, ivan, names)
        for command in block(PUBLISH, "git tag"):
            ivan.run(command, place / "lab")
        (get,) = block(PUBLISH, "dvc artifacts get")
        ivan.run(get.replace("https://git.lab.example/lab.git", str(place / "lab.git")), place)
        assert files_of(place / "system1") == files_of(place / "lab/models/system1")


def test_an_upload_publishes_checkpoint_and_card(place):
    folder, comparison = block(PUBLISH, "hf upload")
    lab = place / "lab"
    with a_hub() as hub:
        ivan = Person(place / "home", HF_ENDPOINT=hub.url, HF_TOKEN=SECRET)
        ivan.run(folder, lab)
        assert hub.files == files_of(lab / "models/system1")
        ivan.run(comparison, lab)
        card = (lab / "reports/cards/system1.md").read_bytes()
        assert hub.files == {**files_of(lab / "models/system1"), "README.md": card}
        assert len(hub.cards) == 2 and all("distillation" in text for text in hub.cards)
        assert_no_secrets(ivan, lab)


def test_no_command_of_the_sections_is_left_untried():
    tried = [*FIRST_LINES.values(), "dvc push", "dvc pull models/system1", "dvc get"]
    assert [block(SHARE, word) for word in tried] == blocks(SHARE)
    assert len(blocks(COMPARE)) == 3
    assert [block(PUBLISH, word) for word in ("hf upload", "git tag", "dvc artifacts get")] == blocks(PUBLISH)

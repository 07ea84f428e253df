"""The plan before a run: its formulas against what torch counts and what runs have measured, its words."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from commandline import distill_here
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.shapes import SHAPES
from distill_app.planning import hardware
from distill_app.planning.hardware import GB, GPUS, cpu
from distill_app.planning.plan import StagePlan, plan_run
from distill_app.planning.shapes import shape_of
from distill_app.planning.training import training_bytes
from distill_app.planning.work import Texts, forward_flops, training_seconds, writing_seconds
from distill_app.profiles import read_sections

TINY = LlamaConfig(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN = {size: Qwen2Config(**SHAPES[f"qwen2.5-{size}"]) for size in ("7b", "0.5b", "1.5b")}
SMOL = LlamaConfig(  # SmolLM2-135M, the bundled teacher
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
# Two cores of an AMD EPYC with AVX-512 BF16, as `distill plan` measured them beside the run of docs/planning.md
MACHINE = cpu(432e9, 55e9, 25 * GB)


@pytest.fixture
def qwen_params(tmp_path):
    """The production profile with configs of Qwen's shapes in local folders; changes as {section: {param: value}}."""
    for name, config in QWEN.items():
        config.save_pretrained(tmp_path / name)

    def write(changes=None) -> Path:
        params = yaml.safe_load((ROOT / "profiles/qwen2.5.yaml").read_text())
        params["label"]["teacher"] = str(tmp_path / "7b")
        params["train_s1"]["student"] = str(tmp_path / "0.5b")
        params["train_s2"]["student"] = str(tmp_path / "1.5b")
        for section, values in (changes or {}).items():
            params[section] |= values
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(params))
        return path

    return write


def stage(plan, name) -> StagePlan:
    return next(found for found in plan.stages if found.stage == name)


def test_a_shape_is_that_of_the_model_with_its_weights():
    model, shape = AutoModelForCausalLM.from_config(TINY), shape_of(TINY)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.body == shape.parameters - 120 * 32 and shape.head == 120 * 32
    assert shape.kv_bytes() == 2 * 3 * 2 * 8 * 2
    assert {p.device.type for p in shape.skeleton.parameters()} == {"meta"}


def test_the_operations_of_a_text_are_those_that_torch_counts():
    """But for masked products, half of the attention's, which torch counts as if they were done."""
    model, tokens = AutoModelForCausalLM.from_config(TINY, attn_implementation="eager"), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    masked = 2 * TINY.num_hidden_layers * TINY.hidden_size * tokens**2
    counted = counter.get_total_flops()
    norms = 2 * TINY.hidden_size * (2 * TINY.num_hidden_layers + 1) * tokens  # no products of matrices
    assert forward_flops(shape_of(TINY), Texts(1, 0, tokens)) - norms == pytest.approx(
        counted - masked, rel=1e-3
    )


@pytest.mark.parametrize(("stage_name", "expected"), [("s1", 57), ("s2", 173)])
def test_a_training_of_the_default_run_takes_what_it_took(stage_name, expected):
    """Records, tokens, steps and seconds of the run of docs/planning.md."""
    config = LlamaConfig(**{**SMOL.to_dict(), "num_hidden_layers": 22 if stage_name == "s1" else 30})
    texts, steps = {"s1": (Texts(232, 4787, 6890), 58), "s2": (Texts(386, 17_733, 22_188), 97)}[stage_name]
    assert training_seconds(shape_of(config), texts, 1, steps, MACHINE) == pytest.approx(expected, rel=0.3)


def test_a_training_that_the_constants_were_not_chosen_on_takes_what_it_took():
    """System 1 in batches of 16 on one core."""
    shape = shape_of(LlamaConfig(**{**SMOL.to_dict(), "num_hidden_layers": 22}))
    one_core = cpu(213e9, 50e9, 25 * GB)
    found = training_seconds(shape, Texts(232, 4787, 6890), 1, 15, one_core)
    assert found == pytest.approx(49, rel=0.3)


@pytest.mark.parametrize(
    ("texts", "longest", "rows", "expected"),
    [
        (Texts(380, 16_968, 16_770), 96, 128, 35),  # the labels
        (Texts(120, 8494, 13_969), 128, 120, 34),  # the teacher's answers to the held-out problems
        (Texts(120, 5510, 6536), 128, 120, 14),  # System 2's
    ],
)
def test_answers_of_the_default_run_take_what_they_took(texts, longest, rows, expected):
    shape = shape_of(SMOL)
    found = writing_seconds(shape, texts, longest, rows, MACHINE, shape.weight_bytes())
    assert found == pytest.approx(expected, rel=0.3)


@pytest.mark.slow
def test_the_stages_of_the_default_run_take_what_they_took(monkeypatch):
    """Nothing of the run is known to the plan: lengths of answers are assumed. Those of 10 seconds and more."""
    monkeypatch.chdir(ROOT)
    plan = plan_run(read_sections("params.yaml"), MACHINE)
    took = {"label": 39, "train_s1": 74, "train_s2": 202, "measure": 131, "benchmark": 20}
    for name, seconds in took.items():
        assert stage(plan, name).seconds == pytest.approx(seconds, rel=0.3), name
    assert plan.seconds == pytest.approx(490, rel=0.3)
    assert stage(plan, "train_s2").tokens_trained == pytest.approx(39_921, rel=0.1)


def test_what_does_not_fit_names_the_param_with_which_it_does(qwen_params):
    plan = plan_run(read_sections(qwen_params({"train_s2": {"training": {}}})), GPUS["a100-40g"])
    assert not any(found.fault for found in plan.stages)
    plan = plan_run(read_sections(qwen_params({"train_s1": {"max_length": 16_384}})), GPUS["l4"])
    assert stage(plan, "train_s1").fault == "set train_s1.training: {gradient_checkpointing: true}"
    fixed = {"train_s1": {"max_length": 16_384, "training": {"gradient_checkpointing": True}}}
    assert not stage(plan_run(read_sections(qwen_params(fixed)), GPUS["l4"]), "train_s1").fault


def test_a_teacher_that_is_too_large_is_quantized_or_spread(qwen_params):
    plan = plan_run(read_sections(qwen_params({"label": {"quantization": "none"}})), cpu(1e12, 1e11, 12 * GB))
    assert stage(plan, "label").fault == "set label.quantization: 8bit"
    plan = plan_run(read_sections(qwen_params()), cpu(1e12, 1e11, 5 * GB))
    assert stage(plan, "label").fault == "set label.gpus_per_worker: 3, with label.engine: vllm"
    spread = read_sections(qwen_params({"label": {"gpus_per_worker": 3}}))
    assert not stage(plan_run(spread, cpu(1e12, 1e11, 5 * GB)), "label").fault


def test_an_adapters_training_takes_less_and_its_checkpoints_too(qwen_params):
    whole = plan_run(read_sections(qwen_params()), GPUS["l4"])
    adapted = plan_run(read_sections(qwen_params({"train_s2": {"lora_rank": 16}})), GPUS["l4"])
    assert stage(adapted, "train_s2").memory < 0.6 * stage(whole, "train_s2").memory
    assert stage(adapted, "train_s2").disk < 0.2 * stage(whole, "train_s2").disk


def test_refining_is_planned_where_it_is_on(qwen_params):
    off = stage(plan_run(read_sections(qwen_params()), GPUS["h100"]), "refine_s1")
    assert (off.seconds, off.memory) == (0, 0)
    on = stage(plan_run(read_sections(qwen_params({"refine_s1": {"steps": 50}})), GPUS["h100"]), "refine_s1")
    assert on.seconds > 60 and on.memory > 7e9 and on.tokens_written == 50 * 0.5 * 32 * 256


def test_verification_rounds_are_planned_where_they_are_on(qwen_params):
    def planned(**changed):
        sections = read_sections(qwen_params({"refine_s2": {"method": "verified", "samples": 4, **changed}}))
        plan = plan_run(sections, GPUS["h100"])
        return stage(plan, "refine_s2"), stage(plan, "train_s2")

    assert planned(rounds=0)[0].seconds == 0
    (one, training), (two, _) = planned(rounds=1, keep=2), planned(rounds=2, keep=2)
    assert one.tokens_trained == pytest.approx(3 * training.tokens_trained)
    assert one.memory >= training.memory and one.tokens_written > 0
    assert two.tokens_written == 2 * one.tokens_written and two.tokens_trained == 2 * one.tokens_trained
    assert one.seconds < two.seconds < 2 * one.seconds + 60


def test_a_model_that_is_not_here_is_named_and_the_rest_is_planned(qwen_params, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = plan_run(read_sections(qwen_params({"train_s1": {"student": "nobody/nothing"}})), GPUS["h100"])
    assert stage(plan, "train_s1").needs.startswith("config.json of nobody/nothing, which is not in the")
    assert not plan.is_whole and stage(plan, "train_s2").memory > 0
    assert "train_s1.student: nobody/nothing" in plan.unpinned


@pytest.mark.slow
def test_a_hub_that_is_not_reached_is_asked_once(tmp_path):
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = ["plan", "--gpu", "h100", "--params", "profiles/qwen2.5.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "distill_app", *command],
        cwd=ROOT,
        env={**os.environ, **closed},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "config.json of Qwen/Qwen2.5-7B-Instruct" in done.stdout


def test_a_download_counts_once_at_the_stage_that_reads_it_first(monkeypatch):
    monkeypatch.setattr(
        "distill_app.planning.models._config", lambda name, _: QWEN[name.split("-")[1].lower()]
    )
    monkeypatch.setattr("distill_app.planning.models._tokenizer_of", lambda *_: None)
    changed = read_sections(ROOT / "profiles/qwen2.5.yaml")
    changed["score_s2"] = changed["score_s2"].model_copy(update={"top_logits": 8})
    plan = plan_run(changed, GPUS["h100"])
    found = {one.stage: one.downloads for one in plan.stages if one.downloads}
    expected = {"label": "7b", "train_s1": "0.5b", "train_s2": "1.5b"}
    assert found == {name: 2 * shape_of(QWEN[size]).parameters for name, size in expected.items()}
    assert stage(plan, "measure").reads == [
        f"Qwen/Qwen2.5-{size}-Instruct" for size in ("7B", "0.5B", "1.5B")
    ]


def test_a_slice_without_a_number_of_rows_is_told(qwen_params):
    plan = plan_run(read_sections(qwen_params({"prepare_s1": {"slice": "train"}})), GPUS["h100"])
    assert "slice train does not say how many rows" in stage(plan, "prepare_s1").needs
    assert stage(plan, "label").needs == "the number of texts, see prepare_s1"


def test_a_servers_tokens_cost_what_it_takes_for_them(qwen_params):
    changes = {"engine": "openai", "base_url": "http://localhost:1/v1", "price_in": 1.0, "price_out": 4.0}
    plan = plan_run(read_sections(qwen_params({"label": changes})), GPUS["h100"])
    label = stage(plan, "label")
    assert "the teacher's weights, which are a server's" in stage(plan, "measure").needs
    assert label.cost == pytest.approx((label.tokens_read + 4 * label.tokens_written) / 1e6)
    assert plan.money(0.0) == label.cost and plan.money(3.6) == pytest.approx(
        label.cost + plan.seconds / 1000
    )


def test_the_command_prints_stages_money_and_what_is_not_pinned(qwen_params):
    done = distill_here("plan", "--gpu", "l4", "--price", "2.5", "--params", str(qwen_params()))
    assert done.returncode == 0, done.stderr
    for said in ("train_s2", "cost", "does not fit: measure", "unpinned: prepare_s1.dataset: alibaba-pai/"):
        assert said in done.stdout
    wrong = distill_here("plan", "--gpu", "l4", "--price", "-1")
    assert wrong.returncode == 1 and "--price: found -1, expected the price of an hour" in wrong.stderr


def test_a_cpu_is_measured_by_a_product_and_a_pass_over_memory(monkeypatch):
    monkeypatch.setattr(hardware, "_seconds", lambda work: work() is None or 0.5)
    found = hardware.this_cpu()
    assert (found.flops, found.bandwidth) == (2 * hardware.MEASURED_SIZE**3 / 0.5, 1.024e9)
    assert found.memory == psutil.virtual_memory().total


# Bytes at most of `python benchmarks/train.py --shape qwen2.5-0.5b --tokens TOKENS --length 512` (docs/planning.md)
@pytest.mark.parametrize(
    ("tokens", "checkpointed", "peak"),
    [
        (1024, False, 7.60e9),
        (2048, False, 10.64e9),
        (4096, False, 14.46e9),
        (2048, True, 7.96e9),
        (4096, True, 8.17e9),
    ],
)
def test_the_memory_of_a_training_of_qwens_shape_is_what_was_measured(
    qwen_params, tokens, checkpointed, peak
):
    training = {"gradient_checkpointing": True} if checkpointed else {}
    params = read_sections(qwen_params({"train_s1": {"max_length": tokens, "training": training}}))[
        "train_s1"
    ]
    assert training_bytes(shape_of(QWEN["0.5b"]), params, GPUS["h100"]) == pytest.approx(peak, rel=0.15)

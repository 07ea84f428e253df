import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from distill_app import write_system1_config, write_system2_config
from distill_app.core.prompts import chat_template
from distill_app.training.config import (
    check_training,
    logging_steps,
    max_length,
    objective_of,
    read_training,
    sft_arguments,
    splits_weights,
    token_budget,
)
from distill_app.training.examples import read_template
from distill_app.training.fields import IDLE, check_fields, is_field, sft_defaults

# configs/kd_black_box_local.json and the keys of kd_white_box.json of EasyDistill v1.0.0
BLACK_BOX = {
    "job_type": "kd_black_box_local",
    "dataset": {
        "instruction_path": "train.json",
        "labeled_path": "train_labeled.json",
        "template": "chat_template/chat_template_kd.jinja",
        "seed": 42,
    },
    "inference": {
        "enable_chunked_prefill": True,
        "seed": 777,
        "gpu_memory_utilization": 0.9,
        "temperature": 0.8,
        "trust_remote_code": True,
        "enforce_eager": False,
        "max_model_len": 4096,
        "max_new_tokens": 512,
    },
    "models": {
        "teacher": "teacher/Qwen/Qwen2.5-7B-Instruct/",
        "student": "student/Qwen/Qwen2.5-0.5B-Instruct/",
    },
    "training": {
        "output_dir": "./result/",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "max_length": 512,
        "save_steps": 1000,
        "logging_steps": 1,
        "learning_rate": 2e-5,
        "weight_decay": 0.05,
        "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine",
    },
}
WHITE_BOX = {
    **BLACK_BOX,
    "job_type": "kd_white_box",
    "dataset": {**BLACK_BOX["dataset"], "logits_path": "logits.json"},
    "distillation": {"kd_ratio": 0.5, "max_seq_length": 512, "distillation_type": "forward_kld"},
}


@pytest.fixture
def job(tmp_path):
    """Return a function that reads a config with some keys changed, `section.key` or a whole section."""

    def read(base=BLACK_BOX, **changes):
        config = json.loads(json.dumps(base))
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                config.setdefault(section, {})[name] = value
            else:
                config[section] = value
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return read_training(path)

    return read


def arguments(found, **options):
    return sft_arguments(found, "scratch", **options)


def test_easydistills_own_black_box_config_is_accepted_key_by_key(job):
    found = job()
    assert (found.output_dir, max_length(found), found.is_white_box) == ("./result/", 512, False)
    assert found.dataset.model_dump() == {**BLACK_BOX["dataset"], "logits_path": None, "too_long": "drop"}
    args = arguments(found)
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (3, 2e-5, 0.05)
    assert (args.lr_scheduler_type, args.save_steps) == ("cosine", 1000)
    assert args.get_warmup_steps(200) == 20
    assert (args.seed, args.data_seed) == (42, 42)


def test_accumulated_batches_are_one_batch_here(job):
    args = arguments(job())
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 1)
    assert token_budget(job()) == 512
    assert token_budget(job(training={"output_dir": "o"})) == 8 * 1024  # SFTConfig's own batch and length


def test_easydistills_own_white_box_config_is_accepted_key_by_key(job):
    found = job(WHITE_BOX)
    assert found.is_white_box and found.distillation.model_dump() == {
        **WHITE_BOX["distillation"],
        "temperature": 1.0,
    }
    del found.training["max_length"]
    assert max_length(found) == 512


def test_older_names_are_accepted(job):
    args = arguments(job(training__warmup_ratio=0.25))
    assert args.get_warmup_steps(100) == 25
    args = arguments(job(training__warmup_ratio=0.25, training__warmup_steps=7))
    assert args.get_warmup_steps(100) == 7
    assert arguments(job(training__warmup_ratio=0.0)).get_warmup_steps(100) == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("evaluation_strategy", "its name is eval_strategy now; write that"),
        ("no_cuda", "its name is use_cpu now"),
        ("max_seq_length", "its name is max_length now"),
        ("adafactor", "its name is optim: adafactor now"),
        ("save_safetensors", "no longer exists .weights are always saved as safetensors.; remove it"),
        ("logging_dir", "no longer exists .*TENSORBOARD_LOGGING_DIR"),
        ("overwrite_output_dir", "no longer exists"),
        ("group_by_length", "has no effect .*without padding"),
    ],
)
def test_a_name_of_an_older_transformers_gets_the_advice_that_fits_it(job, name, says):
    with pytest.raises(ValueError, match=rf"config\.json: training\.{name}: {says}"):
        arguments(job(**{f"training__{name}": True}))


def test_each_field_of_older_transformers_is_known_by_its_old_name():
    """What TrainingArguments 4.51 and SFTConfig 0.17 had and today's have not, as EasyDistill 1.0 pins them."""
    gone = [
        "_n_gpu",
        "adafactor",
        "chars_per_token",
        "dataset_batch_size",
        "fp16_backend",
        "fp16_opt_level",
        "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap",
        "group_by_length",
        "half_precision_backend",
        "include_inputs_for_metrics",
        "include_tokens_per_second",
        "jit_mode_eval",
        "logging_dir",
        "max_seq_length",
        "mp_parameters",
        "no_cuda",
        "num_of_sequences",
        "overwrite_output_dir",
        "past_index",
        "per_gpu_eval_batch_size",
        "per_gpu_train_batch_size",
        "push_to_hub_model_id",
        "push_to_hub_organization",
        "push_to_hub_token",
        "ray_scope",
        "save_safetensors",
        "torchdynamo",
        "tp_size",
        "tpu_metrics_debug",
        "tpu_num_cores",
        "use_ipex",
        "use_legacy_prediction_loop",
        "use_liger",
        "use_mps_device",
        "warmup_ratio",
    ]
    assert not {*gone} & {*sft_defaults()}
    for name in gone:
        if name != "warmup_ratio":
            with pytest.raises(ValueError, match=rf"training\.{name}: (its name is|no longer|has no effect)"):
                check_fields({name: 1}, "training")
        assert is_field(name)


ACTED_ON = [
    "accelerator_config",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "assistant_only_loss",
    "bf16",
    "completion_only_loss",
    "data_seed",
    "dataloader_drop_last",
    "dataloader_in_order",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "fp16",
    "fsdp",
    "fsdp_config",
    "full_determinism",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "ignore_data_skip",
    "label_smoothing_factor",
    "learning_rate",
    "local_rank",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_nan_inf_filter",
    "logging_steps",
    "loss_type",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "max_steps",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "output_dir",
    "per_device_train_batch_size",
    "project",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "seed",
    "tf32",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
    "use_cpu",
    "warmup_steps",
    "weight_decay",
]


def test_each_field_of_sft_config_is_acted_on_or_refused_with_its_reason():
    """A field that a new release brings must be looked at: neither list has it."""
    assert {*ACTED_ON} & {*IDLE} == set()
    assert {*ACTED_ON} | {*IDLE} >= {*sft_defaults()}
    for name, default in sft_defaults().items():
        check_fields({name: default}, "training")
        if name in IDLE:
            with pytest.raises(ValueError, match=f"training.{name}: has no effect in the built-in trainer"):
                check_fields({name: "another"}, "training")


@pytest.mark.parametrize(("found", "near"), [("dff", "dft"), ("nl", "nll")])
def test_a_loss_that_there_is_not_is_refused_and_the_nearest_named(job, found, near):
    with pytest.raises(ValueError, match=rf"training\.loss_type: found {found!r}; did you mean {near}\?"):
        arguments(job(training__loss_type=found))


@pytest.mark.parametrize(
    ("key", "value"),
    [("eval_strategy", "steps"), ("eval_steps", 5), ("eval_delay", 1), ("eval_on_start", True)],
)
def test_an_evaluation_of_nothing_is_refused(job, key, value):
    with pytest.raises(
        ValueError, match=rf"training\.{key}: .* no example is held out; set validation\.fraction"
    ):
        arguments(job(**{f"training__{key}": value}))
    arguments(job(**{f"training__{key}": value}, validation={"fraction": 0.1}), has_validation=True)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_grad_norm", "5e-1", r"found '5e-1' \(str\), expected float; write 5e-1 without quotes"),
        ("neftune_noise_alpha", "5", r"found '5' \(str\), expected .*float"),
        ("gradient_accumulation_steps", "8", r"found '8' \(str\), expected int"),
        ("gradient_checkpointing", "yes", r"found 'yes' \(str\), expected bool"),
        ("max_steps", 1.5, r"found 1\.5 \(float\), expected int"),
        ("learning_rate", True, r"found True \(bool\), expected float"),
    ],
)
def test_a_number_that_is_text_is_told_before_the_first_step(job, key, value, says):
    with pytest.raises(ValueError, match=rf"training\.{key}: {says}"):
        arguments(job(**{f"training__{key}": value}))


def test_without_a_limit_of_its_own_a_job_has_sft_configs(job):
    assert max_length(job(training={"output_dir": "o"})) == 1024
    assert max_length(job(training__max_length=None)) is None
    assert max_length(job(training__max_length=77)) == 77


def test_a_reporter_that_is_not_there_is_told(job):
    with pytest.raises(
        ValueError, match=r"training\.report_to: found 'dvcliv', expected none, all or one of .*dvclive"
    ):
        arguments(job(training__report_to="dvcliv"))
    with pytest.raises(
        ValueError, match=r"training\.report_to: neptune is not installed; pip install neptune"
    ):
        arguments(job(training__report_to=["neptune"]))
    assert arguments(job(training__report_to="none")).report_to == []


def test_a_field_of_adapters_that_is_unknown_is_told_by_the_check(job, tmp_path):
    job(lora={"lora_alfa": 4})
    with pytest.raises(
        ValueError, match=r"config\.json: lora\.lora_alfa: unknown key; did you mean lora_alpha\?"
    ):
        check_training(tmp_path / "config.json")


def test_half_precision_of_one_kind_is_not_of_the_other_too(job, monkeypatch):
    assert not arguments(job(training__fp16=True)).bf16


def test_other_data_than_the_configs_can_be_given(job, tmp_path):
    job()
    found = read_training(tmp_path / "config.json", "other.json", "other.arrow")
    assert (found.dataset.labeled_path, found.dataset.logits_path) == ("other.json", "other.arrow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training__learning_rat": 1},
            r"config\.json: training\.learning_rat: unknown key; did you mean learning_rate\?",
        ),
        ({"training__warmup_rati": 0.1}, r"training\.warmup_rati: .* did you mean warmup_ratio\?"),
        ({"training__qqqq": 1}, r"training\.qqqq: unknown key; remove it"),
        ({"training__lr_scheduler_type": "x"}, r"config\.json: training: x is not a valid SchedulerType"),
        ({"training__use_liger_kernel": True}, r"training\.use_liger_kernel: has no effect in the built-in"),
        ({"training__dataset_text_field": "t"}, r"training\.dataset_text_field: has no effect .*; remove it"),
        ({"training__eos_token": "x"}, r"training\.eos_token: has no effect .*the student's tokenizer"),
        ({"training__chat_template_path": "x"}, r"training\.chat_template_path: has no effect"),
    ],
)
def test_a_training_key_without_a_meaning_is_refused_and_the_nearest_named(job, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(job(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"job_type": "kd_rainbow"},
            r"config\.json: job_type: found 'kd_rainbow', expected one of kd_black_box_",
        ),
        ({"models": {}}, r"config\.json: models\.student: missing; add it"),
        ({"dataset": {"seed": 1}}, r"dataset\.labeled_path: missing"),
        ({"training": {"learning_rate": 1}}, r"training\.output_dir: missing; add it"),
        ({"training": "x"}, r"training: found str, expected an object"),
        ({"dataset__sed": 1}, r"dataset\.sed: unknown key; did you mean seed\?"),
        ({"dataset__too_long": "keep"}, r"dataset\.too_long: found 'keep'"),
        ({"validation__fraction": 1.0}, r"validation\.fraction: found 1.0 .*less than 1"),
        ({"validation__patience": 0}, r"validation\.patience: found 0"),
        ({"distillation__kd_ratio": 1.5}, r"distillation\.kd_ratio: found 1.5"),
        ({"distillation__temperature": 0.0}, r"distillation\.temperature: found 0.0"),
        ({"distillation__distillation_type": "kl"}, r"distillation\.distillation_type: found 'kl'"),
        ({"models__quantization": "2bit"}, r"models\.quantization: found '2bit'"),
        ({"validaton": {}}, r"config\.json: validaton: unknown key; did you mean validation\?"),
        ({"loora": {}}, r"loora: unknown key; did you mean lora\?"),
    ],
)
def test_a_config_that_cannot_be_run_names_the_key(job, changes, message):
    with pytest.raises(ValueError, match=message):
        job(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"models__quantization": "8bit"},
            r"models\.quantization: found 8bit without lora; .*add a lora section",
        ),
        (
            {"job_type": "kd_white_box_train_only", "dataset__logits_path": None},
            r"dataset\.logits_path: missing; add the teacher's probabilities' file",
        ),
        ({"training__completion_only_loss": False}, r"completion_only_loss: found false in a white-box job"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(job, changes, message):
    with pytest.raises(ValueError, match=message):
        job(WHITE_BOX, **changes)


def test_a_top_level_key_that_is_like_none_of_ours_is_left_to_easydistill(job):
    job(comment="ours alone")


def test_a_config_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"c\.json: found list, expected an object"):
        read_training(path)


def test_the_objective_is_what_the_config_says(job):
    words = objective_of(job(training__loss_type="dft", training__label_smoothing_factor=0.1), None, 30.0)
    assert (words.kd_ratio, words.vocab_size) == (0.0, None)
    assert (words.by_confidence, words.label_smoothing, words.softcap) == (True, 0.1, 30.0)
    assert arguments(job(training__label_smoothing_factor=0.1)).label_smoothing_factor == 0.0  # taken once
    assert not objective_of(job(), None, None).by_confidence


def test_held_out_examples_make_the_best_checkpoint_the_last(job):
    args = arguments(job(training__save_steps=7), has_validation=True)
    assert (args.eval_strategy, args.eval_steps, args.save_steps) == ("steps", 7, 7)
    assert args.load_best_model_at_end and args.greater_is_better is False
    args = arguments(job(training__save_steps=7, training__eval_steps=3), has_validation=True)
    assert (args.eval_steps, args.save_steps) == (3, 3)
    args = arguments(job(training__save_strategy="epoch"), has_validation=True)
    assert (args.eval_strategy, args.save_strategy) == ("epoch", "epoch")
    args = arguments(job(training__save_strategy="no"), has_validation=True)
    assert (args.eval_strategy, args.save_strategy) == ("steps", "steps")
    assert arguments(job()).eval_strategy == "no"


def test_a_curves_points_are_as_far_apart_as_the_config_says(job):
    assert [logging_steps(job(training__logging_steps=n)) for n in (1, 25, 0.1)] == [1, 25, 1]
    assert arguments(job(training__logging_steps=25)).logging_steps == 1


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        ({"training__bf16": True}, True),
        ({"training__bf16": False}, False),
        ({"training__bf16": True, "training__optim": "sgd"}, False),
        ({"training__bf16": True, "training__optim": "adamw_torch"}, True),
        ({"training__bf16": True, "lora": {"r": 4}}, False),
    ],
)
def test_weights_are_split_where_bfloat16_and_adamw_meet(job, changes, splits):
    found = job(**changes)
    assert splits_weights(found, arguments(found)) is splits


def test_weights_that_are_spread_over_devices_are_not_split(job, monkeypatch):
    found = job(training__bf16=True)
    args = arguments(found)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not splits_weights(found, args)


def test_configs_hold_what_the_contract_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = json.loads(Path(write_system1_config()).read_text())
    two = json.loads(Path(write_system2_config()).read_text())
    assert one["job_type"] == "kd_black_box_local"
    assert one["dataset"]["instruction_path"] == "data/train_instructions.json"
    assert one["models"] == {
        "teacher": "Qwen/Qwen2.5-7B-Instruct",
        "student": "Qwen/Qwen2.5-0.5B-Instruct",
    }
    assert one["training"]["output_dir"] == "./distilled-qwen2.5-0.5b"
    assert two["job_type"] == "kd_black_box_train_only"
    assert two["dataset"]["labeled_path"] == "data/omnithought_cot.json"
    assert read_template(two["dataset"]["template"]).chat_template == chat_template("system2")
    assert "teacher" not in two["models"] and "backend" not in two
    given = json.loads(Path(write_system2_config("c.json", template_path="/a/b.jinja")).read_text())
    assert given["dataset"]["template"] == "/a/b.jinja"


def test_the_trainer_is_a_command_of_its_own():
    run = subprocess.run(
        [sys.executable, "-m", "distill_app.training", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "EasyDistill 1.0 JSON config" in run.stdout


def test_transformers_is_told_of_checkpointing_by_its_newest_names(job, recwarn):
    """The old ones, which EasyDistill's configs have, are warned of in a stage's output."""
    options = {"use_reentrant": True}
    args = arguments(
        job(training__gradient_checkpointing=True, training__gradient_checkpointing_kwargs=options)
    )
    assert args.activation_checkpointing and args.activation_checkpointing_kwargs == options
    assert not [str(w.message) for w in recwarn if "gradient_checkpointing" in str(w.message)]


def test_the_check_of_a_config_prints_nothing_of_the_libraries(job, tmp_path):
    """bitsandbytes hints at a kernel while PEFT imports it, transformers warns of a field's old name."""
    job(training__gradient_checkpointing=True)
    command = [sys.executable, "-m", "distill_app.training", "--check", "--config", "config.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

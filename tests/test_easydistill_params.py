"""What a person can say of a training in params.yaml, checked before anything that takes hours."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from distill_app.core.params import read_section
from distill_app.easydistill.params import OWN_PARAMS, TrainParams
from distill_app.training.config import read_training, sft_arguments
from stages import write_config


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that runs write_config with some params of train_s2 changed; it gives the config."""
    monkeypatch.chdir(tmp_path)

    def run(profile="params.yaml", **changes):
        params = yaml.safe_load((ROOT / profile).read_text())
        params["train_s2"] |= changes
        Path("params.yaml").write_text(yaml.safe_dump(params))
        Path("metrics").mkdir(exist_ok=True)
        for name in ("prepare_s1", "prepare_s2"):
            Path(f"metrics/{name}.json").write_text("{}")
        write_config.main()
        return json.loads(Path("configs/system2.json").read_text())

    return run


def test_any_field_of_sft_config_reaches_the_training(write):
    fields = {"optim": "adafactor", "max_grad_norm": 0.5, "neftune_noise_alpha": 5.0, "report_to": "dvclive"}
    config = write(training=fields)
    assert {key: config["training"][key] for key in fields} == fields
    arguments = sft_arguments(read_training("configs/system2.json"), "work")
    assert (arguments.optim, arguments.max_grad_norm) == ("adafactor", 0.5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optm": "sgd"}, r"configs/system2\.json: training\.optm: unknown key; did you mean optim\?"),
        ({"optim": "sdg"}, r"configs/system2\.json: training: .*sdg"),
        ({"no_cuda": True}, r"training\.no_cuda: its name is use_cpu now"),
        ({"torch_compile": True}, r"training\.torch_compile: has no effect .*; remove it"),
        ({"report_to": "wandbb"}, r"training\.report_to: found 'wandbb'"),
        ({"learning_rate": 1.0}, r"train_s2\.training: learning_rate is the param learning_rate beside it; set that"),
        ({"num_train_epochs": 2}, r"train_s2\.training: num_train_epochs is the param num_epochs beside it"),
        ({"seed": 2}, r"train_s2\.training: seed is the param seed beside it"),
        ({"output_dir": "x"}, r"train_s2\.training: output_dir is what dvc\.yaml names; remove it"),
    ],
)  # fmt: skip
def test_a_field_without_a_meaning_fails_before_anything_is_labelled_or_trained(write, fields, says):
    with pytest.raises(ValueError, match=says):
        write(training=fields)


def test_easydistills_own_trainer_takes_fields_that_only_its_own_trl_knows(write):
    assert write(backend="easydistill", training={"save_safetensors": True})["training"]["save_safetensors"]
    with pytest.raises(ValueError, match=r"training\.save_safetensor: unknown key; did you mean save_"):
        write(backend="easydistill", training={"save_safetensor": True})


def test_each_param_of_a_field_is_in_the_config_under_the_fields_name(write):
    values = {"num_epochs": 3.0, "batch_size": 2, "save_steps": 7, "learning_rate": 0.5, "max_length": 99}
    config = write(**values)["training"]
    names = {name: key for key, name in (OWN_PARAMS | {"num_train_epochs": "num_epochs"}).items()}
    assert {name: config[names[name]] for name in values} == values
    assert config["eval_steps"] == 7


def test_tokens_a_step_and_at_a_time_are_the_batching_of_the_config(write):
    assert "batching" not in write()
    tokens = {"tokens_per_step": 4096, "tokens_at_a_time": 8192}
    assert write(**tokens)["batching"] == tokens
    assert read_training("configs/system2.json").batching.model_dump() == tokens


def test_the_production_profile_trains_long_rows_with_checkpointing(write):
    config = write("profiles/qwen2.5.yaml")
    assert config["batching"] == {"tokens_per_step": 16384, "tokens_at_a_time": None}
    assert config["training"]["max_length"] == 4096 and config["training"]["gradient_checkpointing"] is True
    assert read_section("train_s1", TrainParams, ROOT / "profiles/qwen2.5.yaml").training == {}


def test_a_map_that_is_none_is_told(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["train_s2"]["training"] = None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ValueError, match=r"train_s2\.training: found NoneType, expected an object of keys"):
        read_section("train_s2", TrainParams, tmp_path / "params.yaml")

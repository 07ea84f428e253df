"""Fixtures: a tiny real model with a tokenizer of its own, made at random once a session."""

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers with two threads each only spin
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the Hub is a defect

ROOT = Path(__file__).parents[1]
TEXTS = [
    "User: Name three fruits that are red.\nAssistant: Strawberries, cherries and raspberries.",
    "Step 1: 4 * 6 = 24 pens.\nStep 2: 24 - 5 = 19 pens.\nThe answer is \\boxed{19}. 0123456789",
    "Think step by step. Input: the quick brown fox jumps over the lazy dog.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, layers: int = 4, seed: int = 0, size: int = 32) -> Path:
    """Write a Llama of about 60,000 parameters with a byte-level BPE tokenizer of 400 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from distill_app.core.models import save_checkpoint

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.3,  # small weights would only repeat the last token
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    save_checkpoint(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path):
    """Model and tokenizer, loaded; do not train it."""
    from distill_app import load_student

    return load_student(str(tiny_model_dir))

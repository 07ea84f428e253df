"""A checkpoint as one GGUF file, which llama.cpp and Ollama run.

The names, the order of rotary halves and the kinds of tokens are those that llama.cpp's own
convert_hf_to_gguf.py writes. What this module does not know it refuses: a file that loads and answers
nonsense helps nobody.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from distill_app.core.files import new_file, require_free_space
from distill_app.core.models import Tokenizer, check_checkpoint, load_tokenizer, quiet_transformers

Precision = Literal["bf16", "f16", "q8_0", "f32"]

ARCHITECTURES = ("llama", "qwen2")  # names that transformers and GGUF share
ELSE = "llama.cpp's convert_hf_to_gguf.py knows more kinds"

# How a tokenizer splits text before it merges, and llama.cpp's name for that
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("words",): "gpt-2",
    ("digit by digit", "words"): "smollm",
    (QWEN2_WORDS, "bytes"): "qwen2",
}
# llama.cpp changes no text before it splits it; NFC leaves nearly all text as it is
NORMALIZERS = {"qwen2": "NFC"}


def export_gguf(folder: str | Path, path: str | Path, precision: Precision = "f16") -> None:
    """Write a checkpoint folder as a GGUF file; a file that stood there stays until the new one is whole.

    Args:
        precision: of the matrices; vectors are float32 as llama.cpp wants them. "bf16" keeps a bfloat16
            checkpoint's weights to the bit, but llama.cpp then rounds activations to bfloat16 too, so "f16"
            comes closer to the checkpoint in float32. "q8_0" is 8 bit in blocks of 32 with a scale each.

    Raises:
        FileNotFoundError: no checkpoint there, or a part is missing.
        ValueError: an architecture, a tokenizer or a precision that this export does not know.
        OSError: the disk is full.
    """
    if precision not in get_args(Precision):
        raise ValueError(f'precision: found "{precision}", expected one of {", ".join(get_args(Precision))}')
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder; train it, pull it or mend the path")
    from gguf import GGUFWriter
    from transformers import AutoConfig

    quiet_transformers()
    check_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    _check_config(folder, config)
    tokenizer = load_tokenizer(str(folder))
    matrices = _Matrices(Path(folder), config, precision)
    require_free_space(path, matrices.size_bytes())
    with new_file(path) as file:
        writer = GGUFWriter(file.name, config.model_type)  # opens the scratch file by its name
        _add_model(writer, Path(folder).resolve().name, config, precision)
        _add_tokenizer(writer, folder, tokenizer, config.vocab_size)
        matrices.write(writer)
        writer.close()


def _check_config(folder: str | Path, config: Any) -> None:
    """Raise ValueError for what would load and then answer otherwise than the checkpoint."""
    known = ", ".join(ARCHITECTURES)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{folder}: found a {config.model_type} model, expected {known}; {ELSE}")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    found = {
        "quantization_config": (bool(getattr(config, "quantization_config", None)), False),
        "rope_type": (rope, "default"),
        "hidden_act": (config.hidden_act, "silu"),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), False),
    }
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise ValueError(f"{folder}: config.json: found {name} {value}, expected {wanted}; {ELSE}")


def _add_model(writer: Any, name: str, config: Any, precision: Precision) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[precision])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, folder: str | Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the byte-level BPE that transformers uses, which need not be what tokenizer.json says."""
    from gguf import TokenType

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(folder, whole))
    added = tokenizer.added_tokens_decoder
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(vocab_size):  # output layers may be wider than the vocabulary
        tokens.append(texts.get(number, f"[PAD{number}]"))
        if number not in texts:
            kinds.append(TokenType.UNUSED)
        elif number not in added:
            kinds.append(TokenType.NORMAL)
        else:
            kinds.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)  # the chat template says all that stands before an answer
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(folder: str | Path, whole: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer splits text."""
    outer = whole["pre_tokenizer"] or {"type": "none"}
    steps = tuple(map(_step, outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]))
    known = PRE_TOKENIZERS.get(steps)
    if normalizer := whole["normalizer"]:
        steps = (normalizer["type"], *steps)
    changes_text = normalizer and normalizer["type"] != NORMALIZERS.get(known or "")
    if whole["model"]["type"] != "BPE" or whole["model"]["byte_fallback"] or known is None or changes_text:
        kind = f"{whole['model']['type']} after {', '.join(steps)}"
        raise ValueError(
            f"{folder}: found a tokenizer ({kind}) that is none of SmolLM2's, Qwen2's or GPT-2's; {ELSE}"
        )
    return known


def _step(step: dict[str, Any]) -> str:
    """Return one step of a pre-tokenizer in a word, or the expression by which it splits."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "words" if regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digit by digit"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return regex
    return step["type"]


class _Matrices:
    """The checkpoint's tensors under GGUF's names; one of them is in memory at a time."""

    def __init__(self, folder: Path, config: Any, precision: Precision) -> None:
        from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

        self.folder, self.config = folder, config
        self.kind = GGMLQuantizationType[precision.upper()]
        self.names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
        self.shapes = {name: shape for name, shape, _ in self._read()}

    def size_bytes(self) -> int:
        """Return how much disk the tensors take."""
        import numpy as np

        return sum(int(np.prod(self._stored(shape)[1])) for shape in self.shapes.values())

    def write(self, writer: Any) -> None:
        """Write the file: what was added to it before, and the tensors."""
        import numpy as np
        from gguf import quants

        for name, shape in self.shapes.items():
            kind, stored = self._stored(shape)
            size_bytes = int(np.prod(stored))
            writer.add_tensor_info(self._gguf_name(name), stored, np.dtype(np.uint8), size_bytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, shape, tensor in self._read():
                values = self._in_order(name, tensor().float().numpy())
                kind = self._stored(shape)[0]
                if kind.name == "F16" and np.abs(values).max() > np.finfo(np.float16).max:
                    raise ValueError(f"{self.folder}: {name} exceeds f16's range; export it as bf16")
                writer.write_tensor_data(quants.quantize(values, kind))
        except OSError as err:  # numpy tells a full disk without an errno
            if err.errno is None:
                raise OSError(errno.ENOSPC, str(err), str(writer.path)) from err
            raise

    def _read(self) -> Iterator[tuple[str, tuple[int, ...], Any]]:
        """Yield each tensor's name and shape, and a function that loads it."""
        from safetensors import safe_open

        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    if name == "lm_head.weight" and self.config.tie_word_embeddings:
                        continue  # llama.cpp takes the embeddings where there is none
                    shape = tuple(file.get_slice(name).get_shape())
                    yield name, shape, lambda file=file, name=name: file.get_tensor(name)

    def _gguf_name(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(
                f"{self.folder}: found a tensor {name}, which a {self.config.model_type} has not;"
                " merge adapters, or train it again"
            )
        return found

    def _stored(self, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
        """Return a tensor's precision in the file, and its shape in bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape

        kind = self.kind if len(shape) > 1 else GGMLQuantizationType.F32
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:  # a row must be whole blocks
            kind = GGMLQuantizationType.F16
        return kind, quant_shape_to_byte_shape(shape, kind)

    def _in_order(self, name: str, values: Any) -> Any:
        """Return a tensor with the rows of each head as llama.cpp's kind of rotary embedding wants them.

        Meta's Llama turns neighbouring rows, `(head, pair, 2)`; transformers keeps the first and the second
        of the pairs apart, `(head, 2, pair)`. GGUF's llama is Meta's, its qwen2 is transformers'.
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        found = [count for part, count in heads.items() if f".self_attn.{part}." in name]
        if self.config.model_type != "llama" or not found:
            return values
        return values.reshape(found[0], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)

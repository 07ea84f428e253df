"""llama.cpp's answers to prompts, for a test to hold against ours; runs in .venv-gguf.

    .venv-gguf/bin/python benchmarks/gguf_peer.py FILE.gguf < asked.json > answered.json

Reads `{"prompts": [str], "max_new_tokens": int}`; writes for each prompt how the file's chat template
renders it, the ids of that, and the ids of the likeliest answer with the one that ended it.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main() -> None:
    asked = json.load(sys.stdin)
    model = Llama(sys.argv[1], n_ctx=1024, verbose=False)
    chat = Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"],
        eos_token=model.detokenize([model.token_eos()], special=True).decode(),
        bos_token=model.detokenize([model.token_bos()], special=True).decode(),
    )
    answered: list[dict[str, Any]] = []
    for prompt in asked["prompts"]:
        rendered = chat(messages=[{"role": "user", "content": prompt}]).prompt
        ids = model.tokenize(rendered.encode(), add_bos=True, special=True)  # adds one if the file says so
        out = list(_likeliest(model, ids, asked["max_new_tokens"]))
        answered.append({"rendered": rendered, "prompt": ids, "answer": out})
    json.dump(answered, sys.stdout)


def _likeliest(model: Llama, ids: list[int], count: int) -> Iterator[int]:
    for _, token in zip(range(count), model.generate(ids, temp=0.0, repeat_penalty=1.0), strict=False):
        yield token
        if token == model.token_eos():
            return


if __name__ == "__main__":
    main()

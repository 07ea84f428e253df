"""`distill export`: a checkpoint for other programs."""

import argparse
from pathlib import Path

HELP = "write a model as a file that llama.cpp and Ollama run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, e.g. models/system1")
    parser.add_argument("--format", choices=["gguf"], default="gguf", help="gguf is all there is")
    parser.add_argument("--out", metavar="PATH", help="the file; else NAME.gguf, as the folder is named")
    parser.add_argument(
        "--precision",
        choices=["f16", "bf16", "q8_0", "f32"],
        default="f16",
        help="of the weights; f16 (default) answers as the checkpoint does, q8_0 takes half the space",
    )


def run(args: argparse.Namespace) -> None:
    """Write the file and say what it became."""
    from distill_app.export.gguf import export_gguf

    path = Path(args.out or f"{Path(args.model).resolve().name}.gguf")
    export_gguf(args.model, path, args.precision)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {args.precision}")

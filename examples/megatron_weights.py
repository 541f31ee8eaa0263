"""Convert weights of published Ling, Ring and MiniMax models to a Megatron checkpoint and back.

    python examples/megatron_weights.py import --input FOLDER --output CHECKPOINT
    python examples/megatron_weights.py export --checkpoint CHECKPOINT --output FOLDER

A FOLDER is one of Hugging Face, in safetensors. examples/megatron.md says what a CHECKPOINT is for.
"""

import argparse
import re
from pathlib import Path

import torch

from parallel.megatron.hf_weights import export_checkpoint, import_folder

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="Hugging Face folder -> Megatron checkpoint")
    command.add_argument("--input", type=Path, required=True, help="Hugging Face folder")
    command.add_argument("--output", type=Path, required=True, help="checkpoint to create")
    command = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face folder")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True, help="folder to create")
    command.add_argument("--like", type=Path, help="folder with the model's config and tokenizer")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--max-shard-size", type=size, default="5GB", help="of a file: 500MB, 5GB")
    return parser.parse_args(argv)


def size(text):
    """Bytes."""
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of KB, MB or GB")
    return int(match[1]) * UNITS[match[2]]


def main(argv=None):
    args = parse_arguments(argv)
    try:
        if args.command == "import":
            import_folder(args.input, args.output, report=print)
        else:
            export_checkpoint(
                args.checkpoint,
                args.output,
                like=args.like,
                dtype=args.dtype and getattr(torch, args.dtype),
                file_bytes=args.max_shard_size,
                report=print,
            )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()

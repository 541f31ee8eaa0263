"""Exchange weights with Hugging Face folders.

    python launch/convert.py export --checkpoint outputs/quickstart/checkpoint --output folder
    python launch/convert.py import --input folder --output outputs/imported

export writes a folder that transformers reads (docs/weights.md). import reads such a folder, or one
of the released TransNormerLLMs, into a checkpoint for launch/train.py and launch/generate.py.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from launch.checkpoint.manifest import seal_file, tensor_file
from launch.checkpoint.saved_run import SavedRun
from launch.checkpoint.store import CheckpointStore, open_checkpoint
from launch.command_line import parse
from launch.config import check_path
from launch.exit_codes import ConfigError, UserError
from launch.files import remove_leftovers, staging_folder
from launch.hf_folder import open_folder, tokenizer_files

_SIZE = re.compile(r"([1-9]\d*)(KB|MB|GB)")
# Of a file of weights in a checkpoint that is imported; so much is in memory at a time.
_FILE_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


@dataclass(kw_only=True)
class Export:
    """Write a Hugging Face folder from a checkpoint."""

    checkpoint: Path
    """A step folder, or the folder of a run's checkpoints (its newest valid one is taken)."""
    output: Path
    """Folder to create; it must not exist."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. float32 is exact; LRPE rates are always float32."""
    max_shard_size: str = "5GB"
    """Largest file of weights, in KB, MB or GB (10^9 bytes); so much is in memory at a time."""


@dataclass(kw_only=True)
class Import:
    """Read a Hugging Face folder, exported or released, into a checkpoint of step 0."""

    input: Path
    """Folder with config.json, weights in .safetensors or .bin files, and tokenizer.json if any."""
    output: Path
    """Folder to create; it must not exist. Gets step-00000000 and model.json."""


def export_checkpoint(
    checkpoint: Path, output: Path, *, dtype: str = "float32", max_shard_size: str = "5GB"
) -> None:
    """Write the Hugging Face folder `output`; nothing is left if it fails.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: `output` exists or cannot be written, or `max_shard_size` is no size.
    """
    limit = _bytes(max_shard_size)
    _check_absent(output)
    check_path("checkpoint", checkpoint)
    saved = SavedRun.read(open_checkpoint(checkpoint))
    family, config, stored = saved.family, saved.shape, saved.weights()
    with torch.device("meta"):
        model = family.build(config)

    files = family.hf_files(config, dtype)
    generation: dict[str, int] = {}
    if saved.tokenizer is not None:
        tokenizer = saved.tokenizer
        files |= tokenizer_files(tokenizer.spec())
        # A tokenizer without a token for padding: transformers pads with the one that ends a text.
        pad_id = tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id
        generation = {
            "bos_token_id": tokenizer.eod_id,
            "eos_token_id": tokenizer.eod_id,
            "pad_token_id": pad_id,
        }
    files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"

    names = family.hf_layout(json.loads(files["config.json"])).names
    ours = {theirs: name for name, theirs in names.items()}
    # The model knows which of its parameters stay float32.
    wanted = {
        names[name]: value for name, value in model.to(getattr(torch, dtype)).state_dict().items()
    }
    with _staged(output) as staging:
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
        index = _write_tensors(
            staging,
            wanted,
            lambda theirs: stored[ours[theirs]][()].to(wanted[theirs].dtype),
            limit,
            {"format": "pt"},
        )
        for path in staging.glob("*.safetensors"):
            # safetensors lets no other user read its files, which are made to be shared here.
            shutil.copymode(staging / "config.json", path)
        if index is not None:
            (staging / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def import_folder(folder: Path, output: Path) -> Path:
    """Write a checkpoint of step 0, `output`/step-00000000, and the model's config, `output`/
    model.json; return the former. Nothing is left if it fails.

    Raises:
        CheckpointError: the folder is damaged, or of a model that is not supported.
        ConfigError: `output` exists or cannot be written.
    """
    _check_absent(output)
    check_path("input", folder)
    source = open_folder(folder)
    config = source.layout.config
    fields = dataclasses.asdict(config)
    state = {
        "step": 0,
        "consumed_samples": 0,
        "family": source.family_name,
        "model": fields,
        "tokenizer": source.tokenizer,
    }
    with torch.device("meta"):
        wanted = dict(source.family.build(config).state_dict())
    with _staged(output) as staging:
        store = CheckpointStore(staging)
        step = store.begin(0)
        _write_tensors(step, wanted, source.read, _FILE_BYTES, None)
        save_file({}, step / tensor_file("optimizer"))
        (step / "state.json").write_text(json.dumps(state), encoding="utf-8")
        path = store.commit(0, step, [seal_file(each) for each in sorted(step.iterdir())])
        (staging / "model.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return output / path.name


def _write_tensors(
    folder: Path,
    wanted: dict[str, Tensor],
    read: Callable[[str], Tensor],
    limit: int,
    metadata: dict[str, str] | None,
) -> dict[str, Any] | None:
    """Write model.safetensors, or several files of at most `limit` bytes (or one tensor) each, of
    which one at a time is in memory.

    Args:
        wanted: tensors on "meta", by name, with the dtypes to be written.

    Returns:
        The index, if there are several files.
    """
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in wanted.items():
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    file_of: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = tensor_file("model", number, len(files))
        save_file({name: read(name) for name in names}, folder / file, metadata=metadata)
        file_of |= dict.fromkeys(names, file)
    if len(files) == 1:
        return None
    total = sum(tensor.nbytes for tensor in wanted.values())
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def _check_absent(output: Path) -> None:
    check_path("output", output)
    # True for a dangling link too: nothing could be renamed onto it.
    if os.path.lexists(output):
        raise ConfigError(f"{output} exists already: choose another output folder or remove it.")


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is renamed to it, or removed if anything fails."""
    staging = staging_folder(output)
    remove_leftovers(output)
    try:
        staging.mkdir(parents=True)
        yield staging
        os.rename(staging, output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{output} cannot be written: {error}.") from None
    finally:
        # Does nothing after the rename.
        shutil.rmtree(staging, ignore_errors=True)


def _bytes(size: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(
            f"max_shard_size is {size!r}: give a whole number of KB, MB or GB, such as 5GB."
        )
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


Arguments = (
    Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    try:
        arguments: Any = parse(
            Arguments,
            argv,
            "launch/convert.py",
            description="Exchange weights with Hugging Face folders.",
        )
        if isinstance(arguments, Export):
            export_checkpoint(
                arguments.checkpoint,
                arguments.output,
                dtype=arguments.dtype,
                max_shard_size=arguments.max_shard_size,
            )
            print(f"{arguments.output}: docs/weights.md says how transformers reads it")
            return 0
        path = import_folder(arguments.input, arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"checkpoint: {path}")
    if not (arguments.input / "tokenizer.json").exists():
        print(f"{arguments.input} has no tokenizer.json: the checkpoint has no tokenizer either")
    model_file = arguments.output / "model.json"
    print(f"to train from it: --checkpoint.resume {path} --model.config {model_file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

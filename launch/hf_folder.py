"""Hugging Face folders: config.json, weights in safetensors or .bin files, a tokenizer.

All of a folder is checked before a tensor is read, and tensors are read one at a time. Reading runs
no code from it: .bin files are pickles, of which tensors alone are taken.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as _Tokenizer
from torch import Tensor

from launch.build import FAMILIES, ModelFamily
from launch.checkpoint.shards import StoredTensor, TensorFiles
from launch.exit_codes import CheckpointError, DataError
from launch.files import is_file, is_folder, read_json
from launch.tokenizer import ByteTokenizer, Tokenizer, tokenizer_from_spec
from launch.tokenizer_file import read_tokenizer

# In the order of preference, which is that of transformers. An index lists the files of a model
# that has several.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HFFolder:
    """A folder that has been checked.

    Attributes:
        family_name, family: a row of the registry in launch/build.py.
        layout: where the weights are, of the family's `hf_layout`; its `config` is the model's.
        tensors: by name; `tensors[name][()]` reads one.
        tokenizer: spec of the tokenizer; None if the folder has none that can be read.
    """

    path: Path
    family_name: str
    family: ModelFamily
    layout: Any
    tensors: Mapping[str, Tensor | StoredTensor]
    tokenizer: dict[str, Any] | None

    def read(self, name: str) -> Tensor:
        """The model's parameter `name`, float32, which represents all dtypes of the files."""
        tensor = self.layout.to_ours(name, self.tensors[self.layout.names[name]][()])
        return tensor.float().contiguous()


def open_folder(path: Path) -> HFFolder:
    """Check a folder and open its files.

    Raises:
        CheckpointError: a missing or damaged file, named; a model of no known family, or a variant
            that is not supported; tensors that are missing, unexpected or of another shape or
            dtype.
    """
    if not is_folder(path):
        raise CheckpointError(f"{path} is not a folder: give one with a config.json and weights.")
    config_path = path / "config.json"
    values = _read_json(config_path)
    family_name, layout = _find_layout(config_path, values)
    tensors = _open_tensors(path)
    problem = layout.problem(tensors)
    if problem is not None:
        raise CheckpointError(f"the weights in {path} are not those of its config.json: {problem}.")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}; weights must be float32, bfloat16 or float16."
            )
    for copy, name in layout.copies.items():
        if copy in tensors and not _same_bits(tensors[copy][()], tensors[name][()]):
            raise CheckpointError(
                f"{path}: {copy} differs from {name}, but this model has one tied matrix."
            )
    tokenizer = _read_tokenizer(path, layout.config.vocab_size)
    return HFFolder(path, family_name, FAMILIES[family_name], layout, tensors, tokenizer)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN is not equal to itself.
    a, b = (each.contiguous().view(torch.uint8) for each in (a, b))
    return torch.equal(a, b)


def _find_layout(path: Path, values: dict[str, Any]) -> tuple[str, Any]:
    """The name of the family that reads this config.json, and the layout of its weights."""
    for name, family in FAMILIES.items():
        try:
            layout = family.hf_layout(values)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{path} has a field of another type than a model's config has ({error}): copy or "
                "download it again."
            ) from None
        if layout is not None:
            return name, layout
    raise CheckpointError(
        f"{path} is of model_type {values.get('model_type')!r}: known are the folders that "
        "launch/convert.py writes (lasp_tnl) and released TransNormerLLMs (transnormer)."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path, allow_nan=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return values


def _open_tensors(folder: Path) -> dict[str, Tensor | StoredTensor]:
    """The tensors of all weight files by name, none of them read."""
    first = next((folder / name for name in _WEIGHT_FILES if is_file(folder / name)), None)
    if first is None:
        raise CheckpointError(f"{folder} has no weights: none of {', '.join(_WEIGHT_FILES)}.")
    index: dict[str, str] = {}
    paths = [first]
    if first.name.endswith(".index.json"):
        index = _read_index(first)
        paths = [folder / name for name in sorted(set(index.values()))]
    tensors: dict[str, Tensor | StoredTensor] = {}
    for path in paths:
        opened = _open_bin(path) if path.suffix == ".bin" else _open_safetensors(path)
        twice = sorted(opened.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{path} has {twice[0]}, which another file has too.")
        absent = [name for name, file in index.items() if file == path.name and name not in opened]
        if absent:
            raise CheckpointError(f"{path} lacks {absent[0]}, which {first} says it has.")
        tensors.update(opened)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; all files exist."""
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f'{path} has no "weight_map" from tensors to files.')
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} puts {name} into {file!r}, which is no file beside it.")
        if not is_file(path.parent / file):
            raise CheckpointError(f"{path.parent / file} is missing, but {path} names it.")
    return index


def _open_safetensors(path: Path) -> Mapping[str, StoredTensor]:
    try:
        return TensorFiles([path])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    except KeyError as error:
        raise CheckpointError(
            f"{path} has weights of dtype {error}; they must be float32, bfloat16 or float16."
        ) from None
    # The metadata is a text that may hold anything.
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or truncated ({error}): copy or download it again."
        ) from None


def _open_bin(path: Path) -> Mapping[str, Tensor]:
    try:
        # Mapped into memory: a tensor is read when it is used.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Damaged files raise about anything.
    except Exception as error:
        why = str(error).partition("\n")[0].removesuffix(".")
        raise CheckpointError(
            f"{path} cannot be read as the weights of a model ({type(error).__name__}: {why}). "
            "It may be truncated, hold more than tensors, or be of a torch before 1.6."
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in tensors.items()
    ):
        raise CheckpointError(f"{path} holds something else than dense tensors by name.")
    return tensors


def tokenizer_files(spec: dict[str, Any]) -> dict[str, str]:
    """The files of a tokenizer in a Hugging Face folder, by name.

    Args:
        spec: of a tokenizer of launch/tokenizer.py. One that has a "tokenizer", the content of a
            tokenizer.json, is written as it is, but for tokens that it would add to each text:
            training adds none.

    Raises:
        DataError: an unknown or damaged spec.
    """
    tokenizer = tokenizer_from_spec(spec)
    description = spec["tokenizer"] if "tokenizer" in spec else byte_description()
    description = _without_added_tokens(description)
    name_of = _Tokenizer.from_str(json.dumps(description)).id_to_token
    end = name_of(tokenizer.eod_id)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # An empty text starts where another has ended, as in launch/generate.py.
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        # As in training: what looks like a special token in a text is text.
        "split_special_tokens": True,
    }
    if tokenizer.pad_id is not None:
        config["pad_token"] = name_of(tokenizer.pad_id)
    return {
        "tokenizer.json": json.dumps(description, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


@functools.cache
def _byte_tokenizer() -> str:
    # The library's alphabet has one character for each byte: the byte's own where that is
    # printable, the others in order from U+0100 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(character) for character in alphabet if ord(character) < 256}
    unprintable = [byte for byte in range(256) if byte not in own]
    shifted = [character for character in alphabet if ord(character) >= 256]
    vocabulary = {chr(byte): byte for byte in own} | dict(zip(shifted, unprintable, strict=True))
    tokenizer = _Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|end_of_document|>", "<|padding|>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    ids = [tokenizer.token_to_id(name) for name in names]
    assert ids == [ByteTokenizer.eod_id, ByteTokenizer.pad_id]
    return tokenizer.to_str()


def byte_description() -> dict[str, Any]:
    """The content of a tokenizer.json with the tokens of `ByteTokenizer`."""
    return json.loads(_byte_tokenizer())


def _read_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    """The spec of the tokenizer in a folder; None if there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = _tokenizer_of(folder, path)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens, the model in {folder} only {vocab_size}."
        )
    return tokenizer.spec()


def _tokenizer_of(folder: Path, path: Path) -> Tokenizer:
    description = _without_added_tokens(_read_json(path))
    if description == byte_description():
        return ByteTokenizer()
    # Not one of prepare_data.py, or damaged: then the second says what is wrong.
    with contextlib.suppress(DataError):
        return tokenizer_from_spec({"kind": "bpe", "tokenizer": description})
    try:
        # With the special tokens that prepare_data.py finds.
        spec = read_tokenizer(path).spec()
        return tokenizer_from_spec({**spec, "tokenizer": description})
    except DataError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def _without_added_tokens(description: dict[str, Any]) -> dict[str, Any]:
    # Post-processors add tokens around a text. (transformers saves one that adds none.)
    return {**description, "post_processor": None}

"""Weights of published Ling, Ring and MiniMax models to a Megatron checkpoint and back.

`import_folder` reads a Hugging Face folder in safetensors and writes what `load_weights` reads, at
any tensor, pipeline and expert parallel size, into a model of `parallel.megatron.presets`.
`export_checkpoint` reads such a checkpoint, or one that training has saved. No number changes. In
memory is at most one file of 500 MB on import, and one tensor (or one expert's) on export. No GPU
and no process group is needed. examples/megatron_weights.py does both from a command line.

As every checkpoint of torch.distributed, one of Megatron's holds pickles: read only your own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    maybe_load_config,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.megatron.hf_folder import (
    HFFolder,
    copy_files,
    grouped,
    open_hf_folder,
    other_files,
    read_config,
    write_safetensors,
)
from parallel.megatron.hf_layout import Entry, other_name

__all__ = ["export_checkpoint", "import_folder", "load_weights"]

# Of a file of weights in a Hugging Face folder, and in a checkpoint. torch's writer of checkpoints
# keeps what it has written until the file is complete, so this much is in memory.
_FILE_BYTES, _CHECKPOINT_FILE_BYTES = 5 * 10**9, 5 * 10**8
# In a checkpoint: the files of the Hugging Face folder beside its weights.
_OTHER_FILES = "hf"


def _silent(line: str) -> None:
    pass


def import_folder(
    folder: Path,
    output: Path,
    *,
    file_bytes: int = _CHECKPOINT_FILE_BYTES,
    report: Callable[[str], None] = _silent,
) -> None:
    """Write the Megatron checkpoint `output` from a Hugging Face folder; nothing is left if it
    fails.

    Args:
        file_bytes: largest file of weights (or one tensor), of which one at a time is in memory.
        report: called with a line after each file.

    Raises:
        ValueError: the folder is damaged or its model not supported, or `output` exists.
    """
    source = open_hf_folder(Path(folder))
    with _staged(Path(output)) as staging:
        _write_checkpoint(source, staging, file_bytes, report)
        (staging / _OTHER_FILES).mkdir()
        copy_files(other_files(source.path), staging / _OTHER_FILES)


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = _FILE_BYTES,
    report: Callable[[str], None] = _silent,
) -> None:
    """Write the Hugging Face folder `output` from a Megatron checkpoint; nothing is left if it
    fails.

    Args:
        checkpoint: folder with metadata.json, from `import_folder` or saved in training.
        like: folder with the config.json, tokenizer and other files of the model; None: those that
            import has put into the checkpoint.
        dtype: of the weights; None: as in the checkpoint. The biases of routers stay float32.
        file_bytes: largest file of weights.
        report: called with a line after each file.

    Raises:
        ValueError: the checkpoint is damaged, or not of the model that `like` describes; `output`
            exists.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    like = checkpoint / _OTHER_FILES if like is None else Path(like)
    if not (like / "config.json").is_file():
        raise ValueError(
            f"{like} has no config.json: name the Hugging Face folder of the model (--like)."
        )
    entries = list(read_config(like).entries())
    stored = _StoredTensors(checkpoint, entries)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for entry in entries:
        kept = dtype is None or entry.key.endswith("expert_bias")
        written = stored.dtype(entry) if kept else dtype
        tensors |= {name: (shape, written) for name, shape in entry.parts}
    with _staged(output) as staging:
        write_safetensors(staging, tensors, _published(entries, stored), file_bytes, report)
        copy_files(other_files(like), staging)
        _note_dtype(staging / "config.json", tensors)


def _published(entries, stored) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        parts = entry.split(stored.read(entry))
        for (name, _), part in zip(entry.parts, parts, strict=True):
            yield name, part


def _note_dtype(config: Path, tensors) -> None:
    """Let config.json name the dtype that most weights have."""
    values = json.loads(config.read_text(encoding="utf-8"))
    dtypes = [dtype for _, dtype in tensors.values()]
    most = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    changed = {n: most for n in ("dtype", "torch_dtype") if values.get(n, most) != most}
    if changed:
        config.write_text(json.dumps(values | changed, indent=2) + "\n", encoding="utf-8")


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the weights of a Megatron checkpoint, each rank its own, at any parallel sizes.

    Args:
        model: this pipeline stage, without wrappers (DDP, Float16Module).
        checkpoint: folder with metadata.json, from `import_folder` or saved in training.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model.
    """
    # Layers of multi-token prediction on another stage than the embedding ask for the group.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = model.sharded_state_dict(metadata={"dp_cp_group": group})
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for tensor in nested_values(wanted):
        if tensor.key not in stored and other_name(tensor.key) in stored:
            tensor.key = other_name(tensor.key)
    state, _, absent = dist_checkpointing.load(
        {"model": wanted},
        str(checkpoint),
        strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL,
    )
    # Layers that need none of Transformer Engine's extra states ask for them all the same.
    absent = sorted(key for key in absent if "_extra_state" not in key)
    if absent:
        raise ValueError(
            f"{checkpoint} lacks {len(absent)} tensors of the model, such as {absent[0]}: it is of "
            "another model."
        )
    model.load_state_dict(state["model"], strict=False)


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is renamed to it, or removed if anything fails."""
    # True for a dangling link too.
    if os.path.lexists(output):
        raise ValueError(f"{output} exists already: choose another folder or remove it.")
    staging = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        os.rename(staging, output)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# Writing: torch's writer asks a planner for the values of each tensor when it comes to it.


def _chunk(entry: Entry) -> ChunkStorageMetadata:
    """The place of an entry in its tensor."""
    if entry.expert is None:
        return ChunkStorageMetadata(torch.Size([0] * len(entry.shape)), torch.Size(entry.shape))
    offsets = (entry.expert[0], *[0] * len(entry.shape))
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size((1, *entry.shape)))


def _global_shape(entry: Entry) -> torch.Size:
    return torch.Size(entry.shape if entry.expert is None else (entry.expert[1], *entry.shape))


def _index(entry: Entry) -> MetadataIndex:
    return MetadataIndex(entry.key, _chunk(entry).offsets)


class _ImportPlanner(SavePlanner):
    """Gives torch's writer the tensors of a folder."""

    def __init__(self, source: HFFolder) -> None:
        self.source = source
        self.entries = {_index(entry): entry for entry in source.entries}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        entry = self.entries[write_item.index]
        return self.source.read(entry).view(_chunk(entry).sizes).contiguous()

    # The plans are made by _write_checkpoint.

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


def _write_checkpoint(source, folder, file_bytes, report):
    sizes = {
        entry: torch.Size(entry.shape).numel() * source.dtype(entry).itemsize
        for entry in source.entries
    }
    groups = grouped(sizes, file_bytes)
    writer = FileSystemWriter(folder, thread_count=1)
    writer.set_up_storage_writer(True)
    # One plan per file, as if each file were that of a rank.
    plans = [
        writer.prepare_local_plan(SavePlan([_write_item(source, entry) for entry in group]))
        for group in groups
    ]
    plans = writer.prepare_global_plan(plans)
    planner = _ImportPlanner(source)
    results = []
    for number, plan in enumerate(plans, 1):
        results.append(writer.write_data(plan, planner).wait())
        report(f"{number} of {len(plans)} files")
    writer.finish(Metadata(_tensor_metadata(source)), results)
    # What Megatron expects beside the sharded tensors.
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), folder)


def _write_item(source, entry):
    data = TensorWriteData(_chunk(entry), _properties(source, entry), _global_shape(entry))
    return WriteItem(_index(entry), WriteItemType.SHARD, tensor_data=data)


def _properties(source, entry):
    return TensorProperties(dtype=source.dtype(entry))


def _tensor_metadata(source) -> dict[str, TensorStorageMetadata]:
    tensors: dict[str, TensorStorageMetadata] = {}
    for entry in source.entries:
        chunk = _chunk(entry)
        if entry.key in tensors:
            tensors[entry.key].chunks.append(chunk)
        else:
            properties = _properties(source, entry)
            tensors[entry.key] = TensorStorageMetadata(properties, _global_shape(entry), [chunk])
    return tensors


# Reading: torch's reader writes into the tensor that a planner names.


class _StoredTensors:
    """The tensors of a Megatron checkpoint, read one at a time.

    Raises:
        ValueError: it is none, or has other tensors than the entries.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry]) -> None:
        if maybe_load_config(str(folder)) is None:
            raise ValueError(
                f"{folder} is no Megatron checkpoint (it has no metadata.json): name the folder of "
                "one iteration, such as iter_0001000."
            )
        self.reader = FileSystemReader(folder)
        try:
            metadata = self.reader.read_metadata()
        except Exception as error:
            raise ValueError(
                f"{folder} cannot be read as a torch_dist checkpoint ({error}): is it complete?"
            ) from None
        self.reader.set_up_storage_reader(metadata, True)
        self.tensors: Mapping[str, Any] = metadata.state_dict_metadata
        self.names = {
            entry.key: entry.key if entry.key in self.tensors else other_name(entry.key)
            for entry in entries
        }
        self._check(folder, entries)

    def _check(self, folder, entries):
        missing = sorted(set(self.names.values()) - self.tensors.keys())
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} tensors of the model, such as {missing[0]}: it is "
                "of another model, or was saved with other settings of Megatron "
                "(hetereogenous_dist_checkpoint=True is needed, singleton_local_shards is not)."
            )
        for entry in entries:
            seen, expected = self._metadata(entry).size, _global_shape(entry)
            fits = seen[0] >= expected[0] if entry.padded else seen[0] == expected[0]
            if not fits or seen[1:] != expected[1:]:
                raise ValueError(
                    f"{entry.key} in {folder} is {tuple(seen)}, but {tuple(expected)} by "
                    "config.json: it is the checkpoint of another model."
                )

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._metadata(entry).properties.dtype

    def _metadata(self, entry):
        return self.tensors[self.names[entry.key]]

    def read(self, entry: Entry) -> Tensor:
        """The values of an entry."""
        chunk = _chunk(entry)
        target = torch.empty(chunk.sizes, dtype=self.dtype(entry))
        name, metadata = self.names[entry.key], self._metadata(entry)
        items = create_read_items_for_chunk_list(name, metadata, [chunk])
        self.reader.read_data(LoadPlan(items), _ExportPlanner(target)).wait()
        return target.view(entry.shape)


class _ExportPlanner(LoadPlanner):
    """Names the part of one tensor that a read fills."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: Any) -> Tensor:
        part = self.target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        pass

    # The plan is made by _StoredTensors.read, and nothing but tensors is read.

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise NotImplementedError

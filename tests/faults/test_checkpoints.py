"""Whatever happens to a checkpoint's files is found before a step is taken, or has no effect."""

import errno
import hashlib
import json
import os
import random
import shutil
import stat

import pytest
import torch
from safetensors.torch import save_file

from launch.checkpoint import parts
from launch.checkpoint.manifest import seal_file, write_manifest
from launch.checkpoint.parts import DamagedError
from launch.checkpoint.shards import TensorFiles, load_shards, shard_of
from launch.checkpoint.store import CheckpointStore, inspect, open_checkpoint, verify
from tests.launch.runs import STEPS, losses, output_of, run_here, save_tensors, start
from tests.launch.test_train_distributed import CP2, arguments

STEP_FOLDER = "step-00000001"
FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
# More in `make test-faults`.
FEW_AND_MANY = [False, pytest.param(True, marks=pytest.mark.faults)]


def contents(step=1):
    generator = torch.Generator().manual_seed(step)
    groups = {
        "model": {"a": (31, 17), "b": (5,), "c": (64, 8)},
        "optimizer": {"exp_avg/a": (31, 17), "step/a": ()},
    }
    return {
        group: {name: torch.randn(shape, generator=generator) for name, shape in each.items()}
        for group, each in groups.items()
    }


@pytest.fixture
def store(tmp_path, monkeypatch):
    """With a checkpoint of step 1, whose files have many parts."""
    monkeypatch.setattr(parts, "PART_BYTES", 256)
    store = CheckpointStore(tmp_path / "checkpoint")
    save_tensors(store, 1, contents(), {"step": 1})
    return store


def read_as_a_resume(path):
    """All that a resume reads, by the same calls. Raises DamagedError."""
    found = inspect(path)
    read = {"state": found.state()}
    for group, expected in contents().items():
        stored = found.open(group)
        if set(stored) != set(expected):
            raise DamagedError("of another model")
        own = {name: torch.zeros_like(value) for name, value in expected.items()}
        load_shards([(shard_of(own[name], is_rank0=True), stored[name]) for name in own])
        read[group] = own
    return read


def is_undamaged(read):
    return read["state"] == {"step": 1} and all(
        torch.equal(read[group][name], value)
        for group, each in contents().items()
        for name, value in each.items()
    )


def test_a_resume_reads_what_was_saved(store):
    assert is_undamaged(read_as_a_resume(store.folder / STEP_FOLDER))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("many", FEW_AND_MANY)
def test_each_flipped_bit_is_found_or_without_effect(store, name, many):
    path = store.folder / STEP_FOLDER / name
    data = path.read_bytes()
    every = len(data) * 8 // 60
    if many:
        # All of them where a bit means most.
        every = 1 if name in ("manifest.json", "state.json") else 31
    effects = 0
    for bit in range(0, len(data) * 8, every):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert is_undamaged(read_as_a_resume(path.parent)), f"bit {bit} passes"
        except DamagedError as error:
            assert name in str(error) and "\n" not in str(error)
            effects += 1
    # White space in the manifest is all that may change unseen.
    assert effects == len(range(0, len(data) * 8, every)) or name == "manifest.json"
    assert effects


def flip(data, at, length, rng):
    data[at] ^= 1 << rng.randrange(8)


def zero(data, at, length, rng):
    data[at : at + length] = bytes(len(data[at : at + length]))


def noise(data, at, length, rng):
    data[at : at + length] = rng.randbytes(len(data[at : at + length]))


def cut_off(data, at, length, rng):
    del data[at:]


def cut_out(data, at, length, rng):
    del data[at : at + length]


def put_in(data, at, length, rng):
    data[at:at] = rng.randbytes(length)


def move(data, at, length, rng):
    part = data[at : at + length]
    del data[at : at + length]
    to = rng.randrange(len(data) + 1)
    data[to:to] = part


def repeat(data, at, length, rng):
    to = rng.randrange(len(data))
    data[to : to + length] = data[at : at + length]


DAMAGES = [flip, zero, noise, cut_off, cut_out, put_in, move, repeat]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("many", FEW_AND_MANY)
def test_damaged_files_are_found_or_unchanged(store, damage, many):
    rng = random.Random(damage.__name__)
    for _ in range(60 if many else 5):
        name = rng.choice(FILES)
        path = store.folder / STEP_FOLDER / name
        before = path.read_bytes()
        data = bytearray(before)
        damage(data, rng.randrange(len(data)), rng.randrange(1, len(data)), rng)
        path.write_bytes(data)
        for read in (read_as_a_resume, verify):
            try:
                read(path.parent)
            except DamagedError as error:
                assert name in str(error) and "\n" not in str(error)
            else:
                assert data == before, f"{damage.__name__} of {name} passes"
        path.write_bytes(before)


def no_permission(path, monkeypatch):
    """What a user who is not root gets from a file without permissions."""
    fail_to("open", errno.EACCES, path, monkeypatch)


def failing_disk(path, monkeypatch):
    opened, opens = set(), os.open

    def note(name, *args, **kwargs):
        descriptor = opens(name, *args, **kwargs)
        (opened.add if os.fspath(name) == str(path) else opened.discard)(descriptor)
        return descriptor

    reads = os.preadv

    def read(descriptor, *args):
        if descriptor in opened:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return reads(descriptor, *args)

    monkeypatch.setattr(os, "open", note)
    monkeypatch.setattr(os, "preadv", read)


def fail_to(call, number, path, monkeypatch):
    original = getattr(os, call)

    def fail(name, *args, **kwargs):
        if os.fspath(name) == str(path):
            raise OSError(number, os.strerror(number), str(name))
        return original(name, *args, **kwargs)

    monkeypatch.setattr(os, call, fail)


def missing(path, monkeypatch):
    path.unlink()


def fifo(path, monkeypatch):
    path.unlink()
    os.mkfifo(path)


def folder(path, monkeypatch):
    path.unlink()
    path.mkdir()


def dangling_link(path, monkeypatch):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def link_to_itself(path, monkeypatch):
    path.unlink()
    path.symlink_to(path)


def empty(path, monkeypatch):
    path.write_bytes(b"")


UNREADABLE = [
    no_permission,
    failing_disk,
    missing,
    fifo,
    folder,
    dangling_link,
    link_to_itself,
    empty,
]


@pytest.mark.parametrize("damage", UNREADABLE, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_an_error_of_its_checkpoint_only(store, damage, name, monkeypatch):
    store = CheckpointStore(store.folder, keep_latest_k=2)
    save_tensors(store, 2, contents(2), {"step": 2})
    path = store.folder / STEP_FOLDER / name
    damage(path, monkeypatch)
    for read in (read_as_a_resume, verify):
        with pytest.raises(DamagedError, match=name) as caught:
            read(path.parent)
        assert "\n" not in str(caught.value)
    assert open_checkpoint(store.folder).step == 2
    # Saves go on, and count the valid ones only. (The second one removes step 2.)
    for step in (3, 4):
        save_tensors(CheckpointStore(store.folder, 2), step, contents(step), {"step": step})
    assert store.steps() == [1, 3, 4]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (failing_disk, "optimizer.safetensors"),
        *(
            pytest.param(damage, name, marks=pytest.mark.faults)
            for damage in UNREADABLE
            for name in FILES
        ),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_a_run_goes_on_from_the_newest_readable_checkpoint(
    run_with_three, tmp_path, data, damage, name, monkeypatch, capsys
):
    folder = tmp_path / "out"
    shutil.copytree(run_with_three, folder)
    newest = folder / "checkpoint" / f"step-{STEPS:08d}"
    with monkeypatch.context() as patch:
        damage(newest / name, patch)
        assert run_here(folder, data, checkpoint__interval=3) == 0
    output = capsys.readouterr()
    assert f"refused:     {newest / name}" in output.out and "step-00000006" in output.out
    assert output.err == ""
    assert losses(folder) == losses(run_with_three)


@pytest.fixture(scope="module")
def run_with_three(tmp_path_factory, data):
    """A run with checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert run_here(folder, data, checkpoint__interval=3) == 0
    return folder


@pytest.mark.usefixtures("one_process")
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_scratch(
    run_with_three, tmp_path, data, capsys
):
    folder = tmp_path / "out"
    shutil.copytree(run_with_three, folder)
    for path in (folder / "checkpoint").glob("*/optimizer.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    before = losses(folder)
    for resume in ("auto", "must", folder / "checkpoint" / f"step-{STEPS:08d}"):
        capsys.readouterr()
        assert run_here(folder, data, checkpoint__resume=resume, training__steps=9) == 70
        error = capsys.readouterr().err
        assert "does not match its hash" in error and error.count("\n") == 1
        assert resume != "auto" or "none of the 3 checkpoints" in error
    assert losses(folder) == before


def test_the_checkpoint_just_saved_is_never_removed(store):
    """As after a start from an older step, beside newer checkpoints."""
    shutil.rmtree(store.folder)
    for keep, left in {1: [7], 2: [7, 12], 3: [7, 8, 12]}.items():
        for step in (8, 12):
            save_tensors(CheckpointStore(store.folder), step, contents(), {"step": step})
        save_tensors(CheckpointStore(store.folder, keep), 7, contents(), {"step": 7})
        assert store.steps() == left
        shutil.rmtree(store.folder)


# Of a tensor [4, 3] that two files share: (shape, offset) of the blocks, and what is wrong.
TILINGS = {
    "twice the same rows": ([((2, 3), [0, 0]), ((2, 3), [1, 0])], "overlap"),
    "a gap that an overlap hides": ([((2, 3), [0, 0]), ((2, 3), [1, 0])], "overlap"),
    "columns over rows": ([((4, 2), [0, 0]), ((2, 2), [0, 1])], "overlap"),
    "rows left out": ([((1, 3), [0, 0]), ((2, 3), [2, 0])], "incomplete"),
    "one block only": ([((2, 3), [2, 0])], "incomplete"),
    "beyond the end": ([((2, 3), [0, 0]), ((2, 3), [3, 0])], "does not fit"),
    "before the start": ([((2, 3), [-1, 0]), ((2, 3), [2, 0])], "invalid place"),
    "an offset with other dimensions": ([((2, 3), [0]), ((2, 3), [2, 0])], "is a shard of"),
    "an offset that is no number": ([((2, 3), [None, 0]), ((2, 3), [2, 0])], "invalid place"),
    "no place at all": ([((2, 3), None), ((2, 3), [2, 0])], "elsewhere"),
}


@pytest.mark.parametrize("name", TILINGS)
def test_blocks_that_do_not_make_up_a_tensor_are_refused(tmp_path, name):
    """Whatever the hashes say: the rest of the tensor would be memory that nobody wrote."""
    blocks, sentence = TILINGS[name]
    paths = []
    for number, (shape, offset) in enumerate(blocks):
        paths.append(tmp_path / f"{number}.safetensors")
        place = {} if offset is None else {"x": [[4, 3], offset]}
        save_file({"x": torch.ones(shape)}, paths[-1], metadata={"pieces": json.dumps(place)})
    with pytest.raises(ValueError, match=sentence):
        TensorFiles(paths)


def test_blocks_in_any_order_make_up_a_tensor(tmp_path):
    full, paths = torch.arange(12.0).view(4, 3), []
    for number, (rows, columns) in enumerate(
        [((2, 4), (0, 3)), ((0, 2), (1, 3)), ((0, 2), (0, 1))]
    ):
        paths.append(tmp_path / f"{number}.safetensors")
        place = json.dumps({"x": [[4, 3], [rows[0], columns[0]]]})
        block = full[slice(*rows), slice(*columns)].contiguous()
        save_file({"x": block}, paths[-1], metadata={"pieces": place})
    assert torch.equal(TensorFiles(paths)["x"][()], full)


def as_format_1(path):
    """Replace the manifest by one of format 1."""
    files = [
        {
            "name": each.name,
            "size": each.stat().st_size,
            "sha256": hashlib.sha256(each.read_bytes()).hexdigest(),
        }
        for each in sorted(path.iterdir())
        if each.name != "manifest.json"
    ]
    write_sealed(path / "manifest.json", {"format": 1, "step": 1, "files": files})


def write_sealed(path, manifest):
    content = json.dumps(manifest, sort_keys=True).encode()
    path.write_text(json.dumps({**manifest, "sha256": hashlib.sha256(content).hexdigest()}))


def test_checkpoints_of_format_1_are_read_and_checked(store):
    path = store.folder / STEP_FOLDER
    as_format_1(path)
    assert is_undamaged(read_as_a_resume(path))
    for name in FILES[1:]:
        before = (path / name).read_bytes()
        for at in range(0, len(before), max(1, len(before) // 20)):
            changed = bytearray(before)
            changed[at] ^= 4
            (path / name).write_bytes(changed)
            for read in (inspect, verify):
                with pytest.raises(DamagedError, match=name):
                    read(path)
        (path / name).write_bytes(before)


def manifest_with(**changes):
    return lambda manifest: manifest | changes


def first_file_with(**changes):
    def change(manifest):
        first, *others = manifest["files"]
        return manifest | {"files": [first | changes, *others]}

    return change


SHA = "0" * 64
DEEP = "[" * 100_000 + "]" * 100_000
# Manifests with a hash that matches, or that no hash can be computed of.
MANIFESTS = {
    "no JSON": "{",
    "empty": "",
    "deep": DEEP,
    "deep value": '{"files": ' + DEEP + "}",
    "a list": "[]",
    "null": "null",
    "a number": "17",
    "a huge number": "1" * 5000,
    "not UTF-8": b"\xff\xfe{}",
    "an older or newer format": manifest_with(format=3),
    "a format that is a text": manifest_with(format="2"),
    "no format": lambda manifest: {k: v for k, v in manifest.items() if k != "format"},
    "no files": manifest_with(files=[]),
    "files null": manifest_with(files=None),
    "files of numbers": manifest_with(files=[1, 2]),
    "a text as step": manifest_with(step="1"),
    "another step": manifest_with(step=2),
    "no step": manifest_with(step=None),
    "a negative step": manifest_with(step=-1),
    "a name with NUL": first_file_with(name="model\0.safetensors"),
    "a name that is a number": first_file_with(name=1),
    "a path as name": first_file_with(name="/etc/passwd"),
    "the folder above": first_file_with(name=".."),
    "an empty name": first_file_with(name=""),
    "a very long name": first_file_with(name="x" * 5000),
    "a name that is no text": first_file_with(name="\ud800"),
    "another size": first_file_with(size=10**30),
    "a size that is a text": first_file_with(size="1"),
    "parts null": first_file_with(parts=None),
    "parts of a text": first_file_with(parts="ab"),
    "a part of no bytes": first_file_with(size=0, parts=[[0, SHA]]),
    "a part of less than no bytes": first_file_with(size=1, parts=[[2, SHA], [-1, SHA]]),
    "a part that is a fraction": first_file_with(size=1, parts=[[1.0, SHA]]),
    "a huge part": first_file_with(size=1 << 80, parts=[[1 << 80, SHA]]),
    "a hash that is none": first_file_with(size=1, parts=[[1, "x"]]),
    "a hash that is a number": first_file_with(size=1, parts=[[1, 7]]),
    "parts of three": first_file_with(size=1, parts=[[1, SHA, 0]]),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_any_manifest_is_an_error_in_one_sentence(store, name):
    path = store.folder / STEP_FOLDER / "manifest.json"
    change = MANIFESTS[name]
    if callable(change):
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        write_sealed(path, change(manifest))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    for read in (inspect, verify, open_checkpoint):
        with pytest.raises(DamagedError) as caught:
            read(path.parent)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 8000
    assert isinstance(caught.value, DamagedError) and caught.value.exit_code == 70


STATES = {"deep": DEEP, "a list": "[]", "null": "null", "no JSON": "{", "not UTF-8": b"\xff"}
HEADERS = {
    "too long": (1 << 60).to_bytes(8, "little") + b"{}",
    "cut off": b"\1\0",
    "empty": b"",
    "no JSON": (2).to_bytes(8, "little") + b"{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "deep": len(DEEP).to_bytes(8, "little") + DEEP.encode(),
    "places deep": {"pieces": DEEP},
    "places a list": {"pieces": "[]"},
    "places null": {"pieces": "null"},
    "places no JSON": {"pieces": "{"},
    "a place that is a number": {"pieces": '{"a": 1}'},
    "a dtype that is not known": {"F32": "F4"},
}


@pytest.mark.parametrize("name", [f"state.json {name}" for name in STATES] + list(HEADERS))
def test_any_content_with_hashes_that_match_is_an_error_in_one_sentence(store, name):
    """As a program of somebody else might have written it."""
    folder = store.folder / STEP_FOLDER
    path, content = folder / "model.safetensors", HEADERS.get(name)
    if content is None:
        path, content = folder / "state.json", STATES[name.removeprefix("state.json ")]
    if isinstance(content, dict) and "pieces" in content:
        save_file(contents()["model"], path, metadata=content)
    elif isinstance(content, dict):
        header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    files = []
    for each in sorted(folder.iterdir()):
        if each.name == path.name:
            files.append(parts.seal(each, [each.stat().st_size]))
        elif each.name != "manifest.json":
            files.append(seal_file(each))
    write_manifest(folder, 1, files)
    verify(folder)
    with pytest.raises(DamagedError) as caught:
        read_as_a_resume(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_part_is_hashed_while_it_is_read_and_not_again(store, monkeypatch):
    path = store.folder / STEP_FOLDER
    sizes, reads = [], os.preadv

    def count(descriptor, buffers, offset):
        done = reads(descriptor, buffers, offset)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            sizes.append(done)
        return done

    monkeypatch.setattr(os, "preadv", count)
    read_as_a_resume(path)
    total = sum(each.stat().st_size for each in path.iterdir())
    headers = sum(
        int.from_bytes((path / name).read_bytes()[:8], "little") + 8 for name in FILES[1:3]
    )
    # The manifest, once for each of inspect, state and two groups; headers, once for their length.
    manifests = 3 * (path / "manifest.json").stat().st_size
    assert sum(sizes) <= total + manifests + headers + 2 * 256


# Rank 1 cannot read one file of the newest checkpoint.
FAILS = """
import errno, os, sys
from launch import train

opens = os.open

def fail(name, *args, **kwargs):
    if os.environ["RANK"] == "1" and str(name).endswith("{file}"):
        raise OSError(errno.EIO, "Input/output error", str(name))
    return opens(name, *args, **kwargs)

os.open = fail
code = train.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.faults
def test_all_ranks_go_on_from_the_checkpoint_that_each_can_read(data, tmp_path):
    folder = tmp_path / "out"
    process = start(arguments(folder, data, **CP2), 2)
    assert process.wait(600) == 0, output_of(process)
    before = losses(folder)
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(file="step-00000015/model.safetensors"))
    process = start(arguments(folder, data, **CP2), 2, script)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "step-00000015/model.safetensors cannot be read: Input/output error" in output
    assert f"resume:      {folder}/checkpoint/step-00000010" in output
    assert losses(folder) == before

"""What may know of what: the rooms of the house keep to their own business."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported_names(path):
    """Every module a file imports, and every attribute chain it writes, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and "." in (chain := ast.unparse(node)):
            # `torch.distributed.x` after a plain `import torch`.
            names.update(chain for root in ("torch.", "lasp.") if chain.startswith(root))
    return names


def offenders(folder, *forbidden):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported_names(path)
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("lasp/ops", ("torch.distributed", "lasp.exchange", "lasp.attention", "lasp.tnl")),
        ("lasp/exchange", ("lasp.ops", "lasp.attention", "lasp.tnl", "triton")),
        ("lasp", ("parallel", "launch")),
        ("parallel", ("triton", "lasp.ops", "launch")),
    ],
)
def test_rooms_do_not_look_into_others(folder, forbidden):
    assert offenders(folder, *forbidden) == []


def test_the_check_sees_what_it_forbids():
    assert offenders("lasp/exchange", "torch.distributed")


IMPORT_ALONE = """
import builtins, socket, sys
real_import = builtins.__import__
def no_triton(name, *args, **kwargs):
    if name.split(".")[0] == "triton":
        raise ImportError("no triton here")
    return real_import(name, *args, **kwargs)
builtins.__import__ = no_triton
class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("import opened a socket")
socket.socket = NoSocket
import torch, lasp, lasp.tnl
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert lasp.lightning_attention(*[torch.ones(1, 3, 1, 2)] * 3).shape == (1, 3, 1, 2)
"""


def test_importing_needs_no_gpu_no_triton_no_group_and_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", IMPORT_ALONE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_explicit_and_sorted():
    import lasp

    assert sorted(lasp.__all__) == lasp.__all__
    assert all(hasattr(lasp, name) for name in lasp.__all__)

"""Which module may import which."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import JOB_TIMEOUT

ROOT = Path(__file__).parent.parent
PRODUCT = ("lasp", "parallel", "launch")


def files_of(*places):
    """The Python files in these folders, and these files themselves."""
    for place in places:
        path = ROOT / place
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert found, f"{place} holds no Python file"
        yield from found


def imported_names(path):
    """Every module a file imports, and every attribute chain it writes, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and "." in (chain := ast.unparse(node)):
            # `torch.distributed.x` after a plain `import torch`.
            names.update(chain for root in ("torch.", "lasp.") if chain.startswith(root))
    return names


def offenders(place, *forbidden):
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(place)
        for name in imported_names(path)
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


CALLS = (
    "lasp.attention",
    "lasp.functional",
    "lasp.halo",
    "lasp.library",
    "lasp.previous_tokens",
    "lasp.softmax_attention",
)


@pytest.mark.parametrize(
    "place, forbidden",
    [
        (
            "lasp/ops",
            ("torch.distributed", "lasp.exchange", "lasp.context", "lasp.tnl", *CALLS),
        ),
        ("lasp/exchange", ("lasp.ops", "lasp.decay", "lasp.tnl", "triton", *CALLS)),
        # The algorithm knows nothing of registration, and registration none of the arithmetic.
        ("lasp/functional.py", ("torch.library", "torch.ops", "lasp.library")),
        ("lasp/halo.py", ("torch.library", "torch.ops", "lasp.library", "lasp.functional")),
        ("lasp/library.py", ("lasp.ops.chunked", "lasp.ops.triton", "lasp.exchange")),
        ("lasp", ("parallel", "launch", "benchmarks", "tests")),
        ("parallel", ("triton", "lasp.ops", "launch", "benchmarks", "tests")),
        ("launch", ("triton", "benchmarks", "tests")),
    ],
)
def test_rooms_do_not_import_others(place, forbidden):
    assert offenders(place, *forbidden) == []


def arithmetic_of(source):
    """Lines that compute with tensors; products of whole numbers may be those of shapes."""
    operators = (ast.MatMult, ast.Div, ast.Pow)
    functions = {"bmm", "cumsum", "einsum", "exp", "matmul", "mul", "sum"}
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        computes = isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, operators)
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if computes or (called and node.func.attr in functions):
            yield lines[node.lineno - 1].strip()


def test_the_registration_of_operators_holds_no_arithmetic():
    assert list(arithmetic_of((ROOT / "lasp/library.py").read_text())) == []
    assert list(arithmetic_of("y = a @ b\nz = torch.exp(y)\nn = len(a) - 1")) == [
        "y = a @ b",
        "z = torch.exp(y)",
    ]


def test_the_check_finds_what_it_forbids():
    assert offenders("lasp/exchange", "torch.distributed")


def import_graph(sources):
    """{module: modules that it imports}, of {module: source}; `from package import module` is an
    import of the module, and not of the package."""
    graph = {}
    for module, source in sources.items():
        graph[module] = imports = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imports.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    imports.add(name if name in sources else node.module)
        imports &= sources.keys()
    return graph


def find_cycle(sources):
    """Modules that import each other in a circle, or None."""
    try:
        graphlib.TopologicalSorter(import_graph(sources)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_through_others():
    sources = {}
    for path in files_of(*PRODUCT):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text()
    cycle = find_cycle(sources)
    assert cycle is None


def test_the_cycle_finder_finds_cycles():
    sources = {"p": "from p import a", "p.a": "from p.b import x", "p.b": "import p.c", "p.c": ""}
    assert find_cycle(sources) is None
    assert set(find_cycle(sources | {"p.c": "from p import a"})) == {"p.a", "p.b", "p.c"}
    assert set(find_cycle(sources | {"p.c": "def f():\n    from p import y"})) == {
        "p",
        "p.a",
        "p.b",
        "p.c",
    }


# Words of an older vocabulary, and those that replace them. One word per thing.
OLD_WORDS = {
    r"\bslates?\b": "shared-memory check",
    r"\bmail-?box(es)?\b": "symmetric-memory buffer",
    r"\bpass_on\b": "put",
    r"\blent\b": "record_stream",
    r"\brelay(s|ed)?\b": "send/recv-state kernel",
    r"\b(peers|Line)\b": "topology, chunk chain",
    r"\bguard\.\w|\bimport guard\b": "consistency check",
    r"\bsettled?\b": "wait",
    r"\b[Pp]lace_borders\b|\bplaces\(": "chunk boundaries",
    r'(?<!")\bpieces?\b': "chunk, score block, tensor shard",
    r"\bprefix_states\b": "chunk_states",
    r"\bscan_(pair|gradients)\b": "scan_dkdv",
    r"\bone_pass\b": "chunk_states, which returns None",
    r"\bstart_state\b|\bStartedState\b|\bto_(zigzag|contiguous)\b": "nothing: deleted",
    r"lasp::(enter|attend|start|finish|softmax_attend)\b|\battend_backward\b": "state_fwd",
    r"\btickets?\b": "handle",
    r"\b(is_)?watched\b": "needs_dispatcher",
    r"\bclass (Bound|Cut)\b": "cached launch, tile config",
    r"\bborders?\b": "boundary",
    r"(?<!\.)(?<!def )\bwhole\(": "full_tensor",
    r"\bclass (Place|World|Run|Outcome)\b": "RankInfo, DistContext, TrainState, StepResult",
    r"\bover_ranks\b": "apply_data_parallel",
    r"\bfirst_decides\b": "on_rank0",
    r"\bpatience\b": "long_timeout",
    r"\bEchoError\b": "RemoteRankError",
    r"\b(some|no)body\b|\bfor ever\b": "plain English: the code as subject",
}


@pytest.mark.parametrize("word", OLD_WORDS)
def test_no_old_word_is_left(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files_of(*PRODUCT)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(word, line)
    ]
    assert found == [], f"say {OLD_WORDS[word]}"


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
        timeout=JOB_TIMEOUT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_explicit_and_sorted():
    import lasp

    assert sorted(lasp.__all__) == lasp.__all__
    assert all(hasattr(lasp, name) for name in lasp.__all__)

"""Compile and launch, without a GPU, with every version of Triton that the Hopper scan supports.

    python tests/triton_versions.py [--versions 3.6.0 3.9.0] [--all] [pytest arguments]

Each version is unpacked by pip into a folder of its own, which comes first on PYTHONPATH; all other
packages are those of this Python. Exits with 1 if a version fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The newest patch of each minor version in `lasp.ops.triton.hopper.available`, and the oldest.
VERSIONS = ("3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0")
TESTS = ("test_available.py", "test_driver.py", "test_hopper_scan.py")


def unpack(version: str, folder: Path) -> Path:
    """The folder with this version of Triton, fetched if it is not there."""
    target = folder / version
    if not (target / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", target, f"triton=={version}"], check=True)
    return target


def passes(target: Path, arguments: list[str]) -> bool:
    """True if the tests pass with the Triton in this folder."""
    tests = [f"tests/lasp/ops/triton/{name}" for name in TESTS]
    path = os.pathsep.join(map(str, (target, ROOT)))
    # Each version has its own cache: kernels that pass must have been compiled.
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(target / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", *tests, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--all", action="store_true", help="the slow tests too: every variant")
    parser.add_argument("--folder", type=Path, help="keep the Tritons here, or find them here")
    options, arguments = parser.parse_known_args()
    if not options.all:
        arguments += ["-m", "not slow"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = {v: passes(unpack(v, folder), arguments) for v in options.versions}
    for version, passed in results.items():
        print(f"triton {version}: {'passed' if passed else 'FAILED'}")
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()

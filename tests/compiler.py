"""The mark of tests that need torch.compile's C++ compiler."""

import shutil

import pytest

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))),
    reason="torch.compile needs a C++ compiler on the CPU, this machine has none",
)

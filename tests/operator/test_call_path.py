"""The way from the public call to a kernel, as docs/how_it_works.md draws it."""

import traceback
from pathlib import Path
from unittest import mock

import torch

import lasp
from lasp import ops

PACKAGE = Path(lasp.__file__).parent
PATH = [
    ("attention.py", "lightning_attention"),
    ("attention.py", "forward"),
    ("functional.py", "attn_fwd"),
    ("ops/triton/scan.py", "scan"),
    ("ops/triton/launcher.py", "__call__"),
]


def frames_to_the_scan(group):
    """(file, function) of every frame between a call and the launch of the scan."""
    from lasp.ops import triton
    from lasp.ops.triton.launcher import CachedLaunch

    paths = []

    def launch(self, *args, **kwargs):
        frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()[:-1]]
        inside = [(x.relative_to(PACKAGE), n) for x, n in frames if x.is_relative_to(PACKAGE)]
        paths.append([(str(x), n) for x, n in inside] + [("ops/triton/launcher.py", "__call__")])

    q, k, v = (torch.zeros(1, 600, 1, 16) for _ in range(3))
    with (
        mock.patch.object(CachedLaunch, "__call__", launch),
        mock.patch.object(ops, "backend", lambda x: triton),
    ):
        lasp.lightning_attention(q, k, v, group=group)
    return paths[-1]


def test_five_frames_in_four_files_lead_to_the_kernel_on_one_device():
    assert frames_to_the_scan(None) == PATH


def test_five_frames_in_four_files_lead_to_the_kernel_over_ranks(pool):
    assert pool.run(frames_to_the_scan, size=2) == [PATH] * 2


def test_the_drawing_shows_these_frames():
    drawing = (PACKAGE.parent / "docs" / "how_it_works.md").read_text()
    for file, _ in PATH:
        assert f"lasp/{file}" in drawing

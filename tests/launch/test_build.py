"""A model family is one row of the registry."""

import dataclasses
import re

import pytest

from launch import generate
from launch.build import FAMILIES, ModelFamily
from launch.checkpoint.store import CheckpointStore
from tests.launch.runs import ROOT, run_here

pytestmark = pytest.mark.usefixtures("one_process")


def recording_family(calls):
    """TNL under another name; notes which fields of its row are called."""
    tnl = FAMILIES["tnl"]

    def recorded(name):
        def call(*args, **kwargs):
            calls.add(name)
            return getattr(tnl, name)(*args, **kwargs)

        return call

    names = {field.name for field in dataclasses.fields(ModelFamily)} - {"config_class"}
    return ModelFamily(config_class=tnl.config_class, **{name: recorded(name) for name in names})


def test_a_row_is_all_that_another_family_needs(tmp_path, data, monkeypatch, capsys):
    calls = set()
    monkeypatch.setitem(FAMILIES, "other", recording_family(calls))
    assert run_here(tmp_path, data, model__family="other", training__steps=1) == 0
    used = {"build", "check_divides", "describe", "num_parameters", "flops_per_token", "stream"}
    used.add("sequence_problem")
    assert calls == used
    found, _ = CheckpointStore(tmp_path / "checkpoint").find("must")
    assert found.state()["family"] == "other"
    calls.clear()
    assert generate.main(["--checkpoint", str(found.path), "--max_new_tokens", "3"]) == 0
    assert calls == {"build", "stream"}


def test_only_build_imports_a_family():
    users = [
        path.name
        for path in (ROOT / "launch").rglob("*.py")
        if re.search(r"lasp\.tnl|token_mixer|lrpe", path.read_text(encoding="utf-8"))
    ]
    assert users == ["build.py"]

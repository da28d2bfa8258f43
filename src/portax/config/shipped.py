"""Files that ship with portax: model configurations, and the folders of other wings."""

import difflib
import importlib.resources
import pathlib
from collections.abc import Iterable

from portax.errors import ConfigError

_PACKAGE = pathlib.Path(str(importlib.resources.files("portax")))


def config_path(model: str) -> pathlib.Path:
    """The shipped configuration of a model.

    Args:
        model: MaxText's name of it, e.g. `qwen3-30b-a3b`.

    Raises:
        ConfigError: No configuration of that name is shipped; the message names the nearest, or lists all.
    """
    known = {path.stem: path for path in configs()}
    if model not in known:
        raise ConfigError(f"no configuration is shipped for {model!r}; {nearest(model, known)}")
    return known[model]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown name: names that are spelled alike, and all known names."""
    known = [*known]
    close = difflib.get_close_matches(name.lower(), known)
    question = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{question}there are {', '.join(known)}"


def configs() -> list[pathlib.Path]:
    """The shipped configurations."""
    return sorted(package_folder("configs", "configs").glob("*.yml"))


def package_folder(installed: str, checkout: str) -> pathlib.Path:
    """A folder of files: a wheel carries them inside the package, an editable install finds them in the checkout.

    Args:
        installed: Its path inside the package.
        checkout: Its path inside the checkout.
    """
    packaged = _PACKAGE / installed
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / checkout

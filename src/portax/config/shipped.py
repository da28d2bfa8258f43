"""Files that ship with portax: model configurations, the demo's goldens, and the page that shows plans."""

import pathlib

from portax.errors import ConfigError

_PACKAGE = pathlib.Path(__file__).parents[1]
_CHECKOUT = _PACKAGE.parents[1]


def config_path(model: str) -> pathlib.Path:
    """The shipped configuration of a model.

    Args:
        model: MaxText's name of it, e.g. `qwen3-30b-a3b`.

    Raises:
        ConfigError: No configuration of that name is shipped; the message lists those that are.
    """
    known = {path.stem: path for path in configs()}
    if model not in known:
        raise ConfigError(f"no configuration is shipped for {model!r}; there are {', '.join(known)}")
    return known[model]


def configs() -> list[pathlib.Path]:
    """The shipped configurations."""
    return sorted(_folder("configs", "configs").glob("*.yml"))


def demo_goldens() -> dict[str, pathlib.Path]:
    """The demo's models: folder with `source.json` and engine goldens, by MaxText's name; scanned, if it can be."""
    found = _folder("goldens", "tests/golden").glob("*/tpu-inference-0.32.0.tp2.json")
    trees = sorted((golden.parent for golden in found), reverse=True)
    return {path.name.rpartition(".")[0]: path for path in sorted(trees, key=lambda path: path.suffix == ".scan")}


def page() -> str:
    """The template of the page that shows a plan or a diff."""
    return (_PACKAGE / "analysis" / "page.html").read_text()


def _folder(installed: str, checkout: str) -> pathlib.Path:
    """A wheel carries the files inside the package; an editable install finds them in the checkout."""
    packaged = _PACKAGE / installed
    return packaged if packaged.is_dir() else _CHECKOUT / checkout

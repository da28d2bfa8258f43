"""Pages that show a picture: one HTML file that needs no network, no server and no other file."""

import base64
import hashlib
import importlib.resources
import json
import os
import pathlib
import re

from portax.analysis.cards import Picture
from portax.checkpoints.file_io import PART, is_full, write_text
from portax.errors import ReportError

_MARK = '<meta name="generator" content="portax">'
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def render(picture: Picture) -> str:
    """Returns the page of a picture.

    Names of leaves cannot inject anything: they are JSON without any character that HTML could read, shown by text
    nodes, under a policy that allows the page's own script and nothing else.
    """
    template = importlib.resources.files("portax.analysis").joinpath("page.html").read_text()
    [script] = _SCRIPT.findall(template)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(picture, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, after = template.replace("@digest@", digest, 1).split("@picture@")
    return before + data + after


def refuse_other(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a page to write; an existing file there must be such a page.

    Raises:
        ReportError: Another file, a folder or a link has this name, or the folder is not there.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise ReportError(f"{path}: there is no folder {path.parent}; nothing was written")
    for taken in (path, path.with_name(path.name + PART)):
        if (taken.exists() or taken.is_symlink()) and not _is_page(taken):
            raise ReportError(f"{taken}: exists, and is no page of portax; nothing was written")
    return path


def write(path: str | os.PathLike, picture: Picture) -> None:
    """Writes the page of a picture, complete or not at all; replaces an existing page of portax.

    Raises:
        ReportError: Another file has this name, or it cannot be written.
    """
    path = refuse_other(path)
    try:
        write_text(path, render(picture))
    except OSError as error:
        path.with_name(path.name + PART).unlink(missing_ok=True)
        what = "the disk is full" if is_full(error) else f"cannot be written ({error})"
        raise ReportError(f"{path}: {what}") from error


def _is_page(path: pathlib.Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return _MARK.encode() in file.read(1000)
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error})") from error

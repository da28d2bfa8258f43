"""Where figures were measured, and the files that they are kept in."""

import argparse
import datetime
import json
import os
import pathlib
import platform
from typing import Any


def machine() -> str:
    """What this runs on."""
    return f"{os.cpu_count()} cores of {platform.machine()}, {platform.platform()}"


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the file."""
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all figures here")


def write(path: pathlib.Path | None, figures: dict[str, Any]) -> None:
    """Writes figures with machine and date; nothing without a file."""
    if path is not None:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        path.write_text(json.dumps({"machine": machine(), "date": today, **figures}, indent=1) + "\n")

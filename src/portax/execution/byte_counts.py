"""Checks of sizes in bytes that callers give, such as `bucket_bytes`."""

import operator
from typing import Any

from portax.errors import ConfigError


def byte_count(name: str, value: Any) -> int:
    """Checks and returns a number of bytes.

    Args:
        name: The caller's name for it, e.g. `bucket_bytes`.
        value: The number: an integer of Python or numpy.

    Raises:
        ConfigError: The value is no integer, or less than 1.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < 1:
        raise ConfigError(f"{name}={value!r}: expected a whole number of bytes, 1 or more, such as {2**30}")
    return count


def parse_byte_count(name: str, text: str) -> int:
    """Reads a number of bytes as it is written in a command.

    Args:
        name: The option, e.g. `--bucket-bytes`.
        text: Its value.

    Raises:
        ConfigError: As `byte_count`.
    """
    return byte_count(name, int(text) if text.isdecimal() else text)

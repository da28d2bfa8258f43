"""The version of portax that is installed."""

import importlib.metadata


def portax_version() -> str:
    """The version, such as `0.1.0`; `unknown` where portax is imported without having been installed."""
    try:
        return importlib.metadata.version("portax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

"""The version of portax that is installed."""

import importlib.metadata


def portax_version() -> str:
    """Returns the version, such as `0.1.0`; `unknown` if portax is imported without being installed."""
    try:
        return importlib.metadata.version("portax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

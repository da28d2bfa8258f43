"""`portax models`: lists the model families, and the sizes with shipped configurations."""

import argparse
from collections.abc import Mapping, Sequence

from rich.table import Table

from portax._text.tables import new_table
from portax.cli import output
from portax.cli.command import Command
from portax.config.model_config import ModelConfig
from portax.config.shipped import configs
from portax.converters import families, read_config
from portax.converters.base import BaseConverter


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    rows = family_rows(families(), {path.stem: read_config(path) for path in configs()})
    output.either(args, rows, _table(rows))
    return 0


def family_rows(known: Mapping[str, type[BaseConverter]], shipped: Mapping[str, ModelConfig]) -> list[dict[str, str]]:
    """Returns a row of facts for each model family.

    Args:
        known: Converters by `decoder_block`.
        shipped: Configurations by MaxText's name of the model.
    """
    return [
        {
            "decoder_block": block,
            "converter": f"{family.__module__}.{family.__qualname__}",
            "what": (family.__doc__ or "").partition("\n")[0],
            "configs": ", ".join(name for name, config in shipped.items() if config.decoder_block == block),
        }
        for block, family in known.items()
    ]


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    table = new_table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    return table


COMMAND = Command("models", "List the model families, and the sizes whose configurations are shipped.", add, run)

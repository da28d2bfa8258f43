"""`portax import`: a checkpoint from the hub to one that MaxText loads."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from portax._text.tables import render, size
from portax.analysis.inspect import tree_table
from portax.checkpoints.atomic_dir import free_space, refuse_existing
from portax.checkpoints.maxtext_import import Import, import_checkpoint, new_arrays
from portax.checkpoints.reading import Checkpoint, open_checkpoint
from portax.cli import arguments
from portax.cli.progress import progress_bar
from portax.config.model_config import ModelConfig
from portax.converters import converter_for
from portax.errors import CheckpointError, ConfigError
from portax.execution.inverse import Restoration
from portax.layouts import HuggingFace

INTERRUPTED = "interrupted; nothing was written"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    text = "a model as the hub has it: a folder of .safetensors with an index, or one such file"
    parser.add_argument("checkpoint", metavar="HUB_CHECKPOINT", help=text)
    arguments.add_model(parser, default="the config.json beside the tensors")
    arguments.add_output(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--scanned", action="store_true", default=True, help="stack the layers, as for scan_layers=true (the default)"
    )
    form.add_argument(
        "--unscanned", action="store_false", dest="scanned", help="a tree for each layer, as for scan_layers=false"
    )
    parser.add_argument("--dtype", choices=arguments.DTYPES, help="default: that of the tensors")


def run(args: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Carries out the command.

    Args:
        args: The parsed command.
        show: Prints a text.
    """
    out = pathlib.Path(args.out)
    refuse_existing(out)
    weights = _opened(args.checkpoint)
    converter = converter_for(_config(args), layout=HuggingFace())
    restoration = converter.restoration(weights, scanned=args.scanned, dtype=args.dtype)
    if args.dry_run:
        tree = _tree(restoration)
        show(json.dumps(tree, indent=1) if args.json else f"{render(tree_table(tree))}{_intent(restoration, out)}")
        return 0
    with progress_bar(f"writing {out.name}") as report:
        done = import_checkpoint(
            converter,
            weights,
            out,
            scanned=args.scanned,
            dtype=args.dtype,
            progress=lambda done: report(done, restoration.nbytes),
        )
    show(json.dumps(dataclasses.asdict(done)) if args.json else _summary(done))
    return 0


def _opened(path: str) -> Checkpoint:
    found = open_checkpoint(path)
    if any("/" in name for name in found):
        raise CheckpointError(f"{path}: is a trainer's checkpoint, not the hub's ({next(iter(found))}); see convert")
    return found


def _config(args: argparse.Namespace) -> ModelConfig:
    named = arguments.named_config(args)
    if named is None:
        path = pathlib.Path(args.checkpoint)
        named = (path if path.is_dir() else path.parent) / "config.json"
        if not named.is_file():
            raise ConfigError(f"no configuration: pass --model or --config; there is no {named}")
    return ModelConfig.of(named)


def _tree(restoration: Restoration) -> dict[str, dict[str, Any]]:
    return {
        array.path: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "bytes": array.nbytes,
            "chunk": list(array.chunk),
        }
        for array in new_arrays(restoration)
    }


def _intent(restoration: Restoration, out: pathlib.Path) -> str:
    count, free = len(restoration.leaves), size(free_space(out))
    return f"would write   {count} leaves, at most {size(restoration.nbytes)}, to {out}; {free} are free there"


def _summary(done: Import) -> str:
    return (
        f"{done.leaves} leaves, {size(done.nbytes)}, written to {done.folder}\n"
        f"{done.seconds:.1f} s, {size(round(done.nbytes / done.seconds))}/s\n"
        f"for MaxText: load_parameters_path={pathlib.Path(done.items).absolute()}"
    )

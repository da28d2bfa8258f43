"""`portax import`: writes a checkpoint for MaxText from one of the hub."""

import argparse
import pathlib
from typing import Any

from rich.console import Group

from portax._text.tables import plural, size, text_lines
from portax.analysis.inspect import tree_table
from portax.checkpoints.atomic_dir import free_space
from portax.checkpoints.maxtext_import import import_checkpoint, new_arrays, unquantised
from portax.checkpoints.reading import Checkpoint
from portax.cli import arguments, inputs, output
from portax.cli.command import Command
from portax.cli.progress import progress_bar
from portax.config.model_config import ModelConfig
from portax.converters import converter_for, read_config
from portax.errors import CheckpointError, ConfigError
from portax.execution.inverse import Restoration
from portax.layouts import HuggingFace


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    text = "a model as the hub has it: a folder of .safetensors with an index, or one such file"
    parser.add_argument("checkpoint", metavar="HUB_CHECKPOINT", help=text)
    arguments.add_model(parser, default="the config.json beside the tensors")
    arguments.add_output(parser)
    form = parser.add_mutually_exclusive_group()
    text = "stack the layers, as for scan_layers=true (the default)"
    form.add_argument("--scanned", action="store_true", default=True, help=text)
    text = "a tree for each layer, as for scan_layers=false"
    form.add_argument("--unscanned", action="store_false", dest="scanned", help=text)
    parser.add_argument("--dtype", choices=arguments.DTYPES, help="default: that of the tensors")
    text = "turn a quantised checkpoint into bfloat16, values times scales; without, it is refused"
    parser.add_argument("--dequantize", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    out = arguments.new_folder(args)
    weights = _opened(args.checkpoint)
    converter = converter_for(_config(args), layout=HuggingFace())
    tensors = unquantised(weights, dequantize=args.dequantize)
    restoration = converter.restoration(tensors, scanned=args.scanned, dtype=args.dtype)
    if args.dry_run:
        tree = _tree(restoration)
        output.either(args, tree, Group(tree_table(tree), text_lines([_intent(restoration, out)])))
        return 0
    with progress_bar(f"writing {out.name}") as report:
        done = import_checkpoint(
            converter,
            weights,
            out,
            scanned=args.scanned,
            dtype=args.dtype,
            dequantize=args.dequantize,
            progress=report,
        )
    output.report(args, done)
    return 0


def _opened(path: str) -> Checkpoint:
    found = inputs.open_values(path)[0]
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
    return read_config(named)


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
    leaves, free = plural(len(restoration.leaves), "leaf", "leaves"), size(free_space(out))
    return f"would write   {leaves}, at most {size(restoration.nbytes)}, to {out}; {free} are free there"


COMMAND = Command(
    "import",
    "Restore a trainer's tree from a checkpoint of the hub and write it as MaxText loads it (Orbax).",
    add,
    run,
)

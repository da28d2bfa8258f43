"""`portax convert`: writes a checkpoint as an engine's or the hub's tensors."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Group

from portax._text.tables import plural, size, text_lines
from portax.checkpoints import config_json
from portax.checkpoints.atomic_dir import existing, free_space, unfinished_folder
from portax.checkpoints.hf_export import BUCKET_BYTES, SHARD_BYTES, export
from portax.checkpoints.safetensors_shards import make_shards
from portax.cli import arguments, inputs, output
from portax.cli.command import Command
from portax.cli.progress import progress_bar
from portax.converters import derive_hub_config
from portax.errors import ConfigError
from portax.layouts import HuggingFace
from portax.planning.plan import Plan


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_weights(parser)
    arguments.add_model(parser)
    arguments.add_layout(parser)
    arguments.add_output(parser)
    config = parser.add_mutually_exclusive_group()
    text = "the hub's config.json, to go with --layout hf; default: derived"
    config.add_argument("--hub-config", metavar="FILE", help=text)
    config.add_argument("--no-hub-config", action="store_true", help="write the tensors alone, with no config.json")
    count = arguments.byte_count
    parser.add_argument("--shard-bytes", type=count, default=SHARD_BYTES, metavar="N", help="most bytes in one file")
    parser.add_argument("--bucket-bytes", type=count, default=BUCKET_BYTES, metavar="N", help="bytes made at a time")
    text = "folder for temporary files; default: the one that --out is in"
    parser.add_argument("--scratch", metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    out, layout = arguments.new_folder(args), arguments.layout(args)
    hub_config = _hub_config(args, layout)
    args.scratch = args.scratch or str(existing(out))
    params, config = arguments.weights_and_config(args, inputs.open_values)
    converter = arguments.converter(args, config, layout)
    plan = converter.plan(params)
    if hub_config is not None:
        config_json.check(hub_config, converter, plan)
    if args.dry_run:
        output.either(args, plan.to_dict(), Group(plan, text_lines([_intent(args, out, plan)])))
        return 0
    with progress_bar(f"writing {out.name}") as report:
        done = export(
            converter,
            params,
            out,
            hub_config=hub_config,
            shard_bytes=args.shard_bytes,
            bucket_bytes=args.bucket_bytes,
            progress=report,
        )
    output.report(args, done)
    return 0


def _interrupted(args: argparse.Namespace) -> str:
    return f"what is whole is kept in {unfinished_folder(args.out)}, and the same command goes on from there"


def _hub_config(args: argparse.Namespace, layout: Any) -> Mapping[str, Any] | None:
    """Returns the `config.json` to write: the named one, or a derived one; None for an engine's tensors.

    Raises:
        ConfigError: It can neither be read nor derived, and `--no-hub-config` was not given; or it is for no engine.
    """
    if not isinstance(layout, HuggingFace):
        if args.hub_config is not None or args.no_hub_config:
            option = "--no-hub-config" if args.no_hub_config else "--hub-config"
            raise ConfigError(f"{option}: a config.json goes with --layout hf, not with {layout}")
        return None
    if args.no_hub_config:
        return None
    if (named := arguments.hub_config(args)) is not None:
        return named
    ways = "pass the hub's, --hub-config, or --no-hub-config to write the tensors alone; nothing was written"
    if (config := arguments.named_config(args)) is None:
        raise ConfigError(f"no config.json for the hub: there is no --model or --config to derive it from; {ways}")
    try:
        return derive_hub_config(config)
    except ConfigError as error:
        raise ConfigError(f"no config.json for the hub: {ways}. {error}") from error


def _intent(args: argparse.Namespace, out: pathlib.Path, plan: Plan) -> str:
    files, free = plural(len(make_shards(plan.entries, args.shard_bytes)), "file"), free_space(out)
    return f"would write   {size(plan.bytes_out)} in {files} to {out}; {size(free)} are free there"


COMMAND = Command(
    "convert",
    "Convert a checkpoint and write sharded safetensors; interrupted, the same command goes on.",
    add,
    run,
    _interrupted,
)

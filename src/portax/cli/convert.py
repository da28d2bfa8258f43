"""`portax convert`: a checkpoint to an engine's or the hub's tensors on disk."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from portax._text.tables import size
from portax.checkpoints import config_json
from portax.checkpoints.atomic_dir import existing, free_space, refuse_existing, unfinished_folder
from portax.checkpoints.hf_export import BUCKET_BYTES, SHARD_BYTES, export
from portax.checkpoints.safetensors_shards import make_shards
from portax.cli import arguments
from portax.cli.progress import progress_bar
from portax.config.to_hub import derive_hub_config
from portax.converters import converter_for
from portax.errors import ConfigError
from portax.layouts import HuggingFace
from portax.planning.plan import Plan

_NO_CONFIG = "no config.json was written: pass the hub's, --hub-config"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_weights(parser)
    arguments.add_model(parser)
    arguments.add_layout(parser)
    arguments.add_output(parser)
    parser.add_argument(
        "--hub-config", metavar="FILE", help="the hub's config.json, to go with --layout hf; default: derived"
    )
    parser.add_argument(
        "--shard-bytes", type=arguments.byte_count, default=SHARD_BYTES, metavar="N", help="most bytes in one file"
    )
    parser.add_argument(
        "--bucket-bytes", type=arguments.byte_count, default=BUCKET_BYTES, metavar="N", help="bytes made at a time"
    )
    parser.add_argument(
        "--scratch", metavar="DIR", help="folder for temporary files; default: the one that --out is in"
    )


def run(args: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Carries out the command.

    Args:
        args: The parsed command.
        show: Prints a text.
    """
    out = pathlib.Path(args.out)
    refuse_existing(out)
    layout = arguments.layout(args)
    hub_config, reason = _hub_config(args, layout)
    params, config = arguments.weights_and_config(args, scratch=pathlib.Path(args.scratch or existing(out)))
    converter = converter_for(config, layout=layout, strict_dtype=args.strict_dtype)
    plan = converter.plan(params)
    if hub_config is not None:
        config_json.check(hub_config, converter, plan)
    if args.dry_run:
        show(plan.to_json() if args.json else f"{plan}\n{_intent(args, out, plan)}")
        return 0
    with progress_bar(f"writing {out.name}") as report:
        done = export(
            converter,
            params,
            out,
            hub_config=hub_config,
            shard_bytes=args.shard_bytes,
            bucket_bytes=args.bucket_bytes,
            progress=lambda done: report(done, plan.bytes_out),
        )
    show(json.dumps(dataclasses.asdict(done)) if args.json else _summary(done, reason))
    return 0


def interrupted(args: argparse.Namespace) -> str:
    """What to say when the command was interrupted."""
    return (
        f"interrupted; what is whole is kept in {unfinished_folder(args.out)}, and the same command goes on from there"
    )


def _hub_config(args: argparse.Namespace, layout: Any) -> tuple[Mapping[str, Any] | None, str | None]:
    """The hub's config, and why there is none."""
    if not isinstance(layout, HuggingFace):
        if args.hub_config is not None:
            raise ConfigError(f"--hub-config: a config.json goes with --layout hf, not with {layout}")
        return None, None
    if (told := config_json.told(args.hub_config, args.config)) is not None:
        return told, None
    if (config := arguments.named_config(args)) is None:
        return None, f"{_NO_CONFIG}, or --model or --config, to derive it from"
    try:
        return derive_hub_config(config), None
    except ConfigError as error:
        return None, f"{_NO_CONFIG}; {error}"


def _intent(args: argparse.Namespace, out: pathlib.Path, plan: Plan) -> str:
    count, free = len(make_shards(plan.entries, args.shard_bytes)), free_space(out)
    return f"would write   {size(plan.bytes_out)} in {_files(count)} to {out}; {size(free)} are free there"


def _summary(done: Any, reason: str | None) -> str:
    rate = size(round(done.nbytes / done.seconds))
    kept = f", {done.resumed} of them from before" if done.resumed else ""
    lines = [f"{done.tensors} tensors, {size(done.nbytes)} in {_files(done.shards)}{kept}, written to {done.folder}"]
    lines += [f"{done.seconds:.1f} s, {rate}/s"]
    lines += [reason] if reason else []
    return "\n".join(lines)


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"

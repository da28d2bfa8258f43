"""`portax validate`: converts a checkpoint, loads it into an engine, and generates."""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Group

from portax._text.tables import text_lines
from portax.checkpoints import config_json
from portax.cli import arguments, output
from portax.cli.command import Command
from portax.errors import ConfigError
from portax.validation import session
from portax.validation.coverage import coverage_table


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a trainer's checkpoint, as for convert")
    arguments.add_model(parser)
    text = "the hub's config.json; default: --config, if it is one, or config.json in the checkpoint's folder"
    parser.add_argument("--hub-config", metavar="FILE", help=text)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="what to go on from; needs --tokenizer")
    what.add_argument("--tokens", type=_tokens, metavar="ID,ID,...", help="the same as token ids")
    parser.add_argument("--tokenizer", metavar="PATH", help="local folder of the model's tokenizer")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="what generates")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of vllm (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=session.MAX_NEW_TOKENS, metavar="N")
    parser.add_argument("--scratch", metavar="DIR", help="folder for a temporary file; default: the system's")
    parser.add_argument("--dry-run", action="store_true", help="plan, check, show; load nothing, needs no engine")


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    job = session.prepare(
        args.checkpoint,
        _hub_config(args),
        args.prompt if args.prompt is not None else args.tokens or session.DEFAULT_TOKENS,
        config=arguments.named_config(args),
        tokenizer=args.tokenizer,
        max_new_tokens=args.max_new_tokens,
        scratch=args.scratch,
    )
    if args.dry_run:
        output.either(args, _intent_json(job, args), _intent(job, args))
        return 0
    engine = _engine(args)
    with output.status(f"converting, loading {engine.name}, generating ..."):
        done = session.carry_out(job, engine)
    output.report(args, done)
    return 0


def _tokens(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(token) for token in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids, such as 2,50429,563") from error


def _hub_config(args: argparse.Namespace) -> Mapping[str, Any]:
    found = arguments.hub_config(args)
    beside = pathlib.Path(args.checkpoint) / "config.json"
    if found is None and beside.is_file():
        found = config_json.read(beside)
    if found is None:
        raise ConfigError("no hub config.json: an engine is made from it; pass the model's, --hub-config")
    return found


def _engine(args: argparse.Namespace) -> session.Engine:
    if args.engine == "vllm":
        from portax.integrations.vllm import Vllm

        return Vllm(tp=args.tp)
    from portax.integrations.transformers import Transformers

    return Transformers()


def _intent(job: session.Job, args: argparse.Namespace) -> Group:
    what = f"would generate up to {job.max_new_tokens} tokens with {args.engine}"
    return Group(coverage_table(job.coverage()), text_lines([session.prompt_line(job.prompt), what]))


def _intent_json(job: session.Job, args: argparse.Namespace) -> dict[str, Any]:
    rows = [dataclasses.asdict(row) for row in job.coverage()]
    prompt = {"prompt": job.prompt.tokens, "bos": job.prompt.bos}
    return {"engine": args.engine, **prompt, "max_new_tokens": job.max_new_tokens, "coverage": rows}


COMMAND = Command(
    "validate",
    "Convert a checkpoint, load it into an engine, generate greedily: does the converted model talk?",
    add,
    run,
)

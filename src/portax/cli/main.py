"""The `portax` command: models, inspect, plan, convert, import, diff, validate, verify, demo, doctor.

Exit codes: 0 done, and exact or equal; 1 a leaf differs, or the plan has problems; 2 the command, a file, the
configuration or the layout is not usable, what is to be compared cannot be, or the disk is full; 130 interrupted.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from absl.flags import argparse_flags
from jax.sharding import Mesh
from rich.console import Console, RenderableType

from portax.analysis import cards, cost_model, html_page, inspect
from portax.checkpoints.reading import open_checkpoint
from portax.cli import arguments, convert, diff, import_, report, validate
from portax.config.model_config import ModelConfig
from portax.config.shipped import configs
from portax.converters import converter_for, families
from portax.errors import PlanError, PortaxError
from portax.testing import demo, doctor
from portax.testing.golden import Comparison, Golden, compare

_INTERRUPTED = 130  # as shells count it


def run() -> None:
    """Entry point of the `portax` command."""
    app.run(main, flags_parser=parse)


def main(args: argparse.Namespace) -> int:
    """Carries out a parsed command and returns its exit code."""
    if args.quiet:
        logging.set_verbosity(logging.WARNING)
    try:
        return args.command(args)
    except PlanError as error:
        logging.error("%s", error)
        return 1
    except PortaxError as error:
        logging.error("%s", error)
        return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line, program name first."""
    parser = argparse_flags.ArgumentParser(prog="portax", description=__doc__.splitlines()[0], epilog=_exit_codes())
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, inherited_absl_flags=None)
        sub.set_defaults(command=function)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    command("models", _models, "List the model families, and the sizes whose configurations are shipped.")
    look = command("inspect", _inspect, "Show what is in a checkpoint, and which model it is of; reads no weight.")
    look.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="an Orbax checkpoint, or safetensors of a trainer's tree"
    )
    arguments.add_model(look)
    plan = command("plan", _plan, "Show what would be written from what; touches no weight.")
    arguments.add_weights(plan)
    arguments.add_model(plan)
    arguments.add_layout(plan)
    arguments.add_compile(plan)
    arguments.add_page(plan)
    text = "Convert a checkpoint and write sharded safetensors; interrupted, the same command goes on."
    convert.add(command("convert", _convert, text))
    text = "Restore a trainer's tree from a checkpoint of the hub and write it as MaxText loads it (Orbax)."
    import_.add(command("import", _import, text))
    diff.add(command("diff", _diff, "Show what differs between two checkpoints, leaf by leaf."))
    text = "Convert a checkpoint, load it into an engine, generate greedily: does the converted model talk?"
    validate.add(command("validate", _validate, text))
    verify = command("verify", _verify, "Convert a tree and hold every leaf against a golden file, both ways.")
    arguments.add_weights(verify)
    arguments.add_model(verify)
    verify.add_argument("--golden", required=True, metavar="FILE", help="digests of an engine's state, or hf.json")
    show = command("demo", _demo, "Convert shipped MaxText trees and check every leaf against the real engine's.")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--model", action="append", default=[], metavar="NAME", help="only this model; may be repeated")
    which.add_argument("--all", action="store_true", help="every shipped tree; takes minutes")
    check = command("doctor", _doctor, "Scramble an engine's state, sync into it, check every leaf; on shipped data.")
    check.add_argument("--model", default="qwen3-30b-a3b", metavar="NAME", help="a shipped tree (default: %(default)s)")
    check.add_argument("--tp", type=int, default=2, choices=demo.TENSOR_PARALLEL, help="tensor-parallel size")
    args = parser.parse_args(argv[1:])
    args.quiet = flags.FLAGS["verbosity"].using_default_value  # absl sets it afterwards
    return args


def _exit_codes() -> str:
    return " ".join((__doc__ or "").split("\n\n")[1].split())


def _models(args: argparse.Namespace) -> int:
    rows = report.families(families(), {path.stem: ModelConfig.of(path) for path in configs()})
    if args.json:
        _print(json.dumps(rows, indent=1))
    else:
        _show(report.families_table(rows))
    return 0


def _plan(args: argparse.Namespace) -> int:
    page, layout = arguments.page(args), arguments.layout(args)
    meshes = arguments.meshes(args, layout) if args.compile else None
    if meshes is not None:
        _simulate_devices(math.prod(meshes[0].values()))
    params, config = arguments.weights_and_config(args, required=False)
    converter = converter_for(config, layout=layout, strict_dtype=args.strict_dtype)
    params = converter.expected_tree() if params is None else params
    what = args.checkpoint or args.tree or args.model or args.config
    try:
        plan = converter.plan(params)
    except PlanError as error:
        if page:
            html_page.write(page, cards.of_plan(error.plan, params, what=what, problems=error.problems))
        raise
    if page:
        html_page.write(page, cards.of_plan(plan, params, what=what))
    if meshes is None:
        _print(plan.to_json() if args.json else str(plan))
        return 0
    with Console(stderr=True).status("compiling every program of a sync ..."):
        cost = cost_model.estimate(converter, *map(cost_model.simulated_mesh, meshes))
    if args.json:
        _print(json.dumps({**json.loads(plan.to_json()), "compiled": cost.to_dict()}, indent=1))
    else:
        _print(f"{plan}\n\n{cost}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    try:
        return convert.run(args, _print)
    except KeyboardInterrupt:
        logging.error("%s", convert.interrupted(args))
        return _INTERRUPTED


def _diff(args: argparse.Namespace) -> int:
    try:
        return diff.run(args, _print)
    except KeyboardInterrupt:
        logging.error("interrupted")
        return _INTERRUPTED


def _validate(args: argparse.Namespace) -> int:
    return validate.run(args, _print)


def _import(args: argparse.Namespace) -> int:
    try:
        return import_.run(args, _print)
    except KeyboardInterrupt:
        logging.error("%s", import_.INTERRUPTED)
        return _INTERRUPTED


def _inspect(args: argparse.Namespace) -> int:
    given = arguments.named_config(args)
    shipped = {path.stem: ModelConfig.of(path) for path in configs()}
    config = None if given is None else ModelConfig.of(given)
    found = inspect.inspect(open_checkpoint(args.checkpoint), shipped, config)
    if args.json:
        _print(json.dumps(found, indent=1))
    else:
        _show(inspect.report(found))
    return 0


def _verify(args: argparse.Namespace) -> int:
    golden = Golden.load(args.golden)
    axes = golden.layout.mesh_axes
    count = math.prod(axes.values())
    _simulate_devices(max(demo.DEVICES, count))
    params, config = arguments.weights_and_config(args)
    mesh = Mesh(np.array(jax.devices()[:count]).reshape([*axes.values()]), tuple(axes)) if axes else None
    weights = converter_for(config, layout=golden.layout, mesh=mesh).convert(params)
    rows = compare(weights, golden)
    if args.json:
        _print(json.dumps({"layout": repr(golden.layout), "exact": _exact(rows), "leaves": _rows_json(rows)}, indent=1))
    else:
        _show(report.comparison_table({"leaves": rows}, title=str(golden.layout)))
        _print(_tally(rows))
    return 0 if _exact(rows) else 1


def _demo(args: argparse.Namespace) -> int:
    _simulate_devices(demo.DEVICES)
    start = time.perf_counter()
    runs: list[demo.Run] = []
    with Console(stderr=True).status("planning, compiling and converting the first model ...") as status:
        for run in demo.runs(demo.all_models() if args.all else args.model):
            runs.append(run)
            status.update(f"{run.model}, tp={run.tp}: {_tally(run.rows)}")
    seconds = time.perf_counter() - start
    exact = all(run.exact for run in runs)
    if args.json:
        _print(json.dumps({"exact": exact, "seconds": round(seconds, 3), "runs": [_run_json(run) for run in runs]}))
        return 0 if exact else 1
    for model, of_model in itertools.groupby(runs, key=lambda run: run.model):
        same = list(of_model)
        _show(report.comparison_table({f"tp={run.tp}": run.rows for run in same}, title=f"{model}, {same[0].engine}"))
    leaves = sum(len(run.rows) for run in runs)
    verdict = "every one exact" if exact else "NOT all exact"
    _print(f"{len(runs)} conversions, {leaves} leaves against the real engine's digests: {verdict}. {seconds:.0f} s")
    return 0 if exact else 1


def _doctor(args: argparse.Namespace) -> int:
    _simulate_devices(demo.DEVICES)
    with Console(stderr=True).status("scrambling, syncing, looking at every leaf ..."):
        checks = list(demo.examination(args.model, args.tp))
    passed = all(check.passed for check in checks)
    if args.json:
        _print(json.dumps({"passed": passed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
    else:
        _show(doctor.table(checks, title=f"{args.model}, tp={args.tp}"))
    return 0 if passed else 1


def _run_json(run: demo.Run) -> dict[str, Any]:
    seconds = round(run.seconds, 3)
    return {"model": run.model, "tp": run.tp, "exact": run.exact, "seconds": seconds, "leaves": _rows_json(run.rows)}


def _show(table: RenderableType) -> None:
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)


def _simulate_devices(count: int) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's advice on partitioning is about tiny arrays here
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _exact(rows: Sequence[Comparison]) -> bool:
    return not any(row.difference for row in rows)


def _tally(rows: Sequence[Comparison]) -> str:
    wrong = sum(bool(row.difference) for row in rows)
    return f"{len(rows)} leaves, {f'{wrong} differ' if wrong else 'all exact'}"


def _rows_json(rows: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    return {row.name: {"bytes": row.nbytes, "exact": not row.difference, "difference": row.difference} for row in rows}


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")

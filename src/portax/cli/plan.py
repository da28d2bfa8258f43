"""`portax plan`: shows every leaf that a conversion would write, and its sources."""

import argparse
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Group

from portax.analysis import cards, cost_model, html_page
from portax.cli import arguments, devices, inputs, output
from portax.cli.command import Command
from portax.converters.base import BaseConverter
from portax.errors import PlanError
from portax.planning.plan import Plan


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_weights(parser, filled=True)
    arguments.add_model(parser)
    arguments.add_layout(parser)
    arguments.add_compile(parser)
    arguments.add_page(parser)


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    page, layout = arguments.page(args), arguments.layout(args)
    meshes = arguments.meshes(args, layout) if args.compile else None
    if meshes is not None:
        devices.simulate(math.prod(meshes[0].values()))
    params, config = arguments.weights_and_config(args, inputs.open_filled, required=False)
    converter = arguments.converter(args, config, layout)
    params = converter.expected_tree() if params is None else params
    plan = _planned(converter, params, page, args.checkpoint or args.tree or args.model or args.config)
    if meshes is None:
        output.report(args, plan)
        return 0
    with output.status("compiling every program of a sync ..."):
        cost = cost_model.estimate(converter, *map(cost_model.simulated_mesh, meshes))
    output.either(args, {**plan.to_dict(), "compiled": cost.to_dict()}, Group(plan, "", cost))
    return 0


def _planned(converter: BaseConverter, params: Mapping[str, Any], page: pathlib.Path | None, what: str) -> Plan:
    """Returns the plan; writes the page, with the plan's problems if it has any."""
    try:
        plan = converter.plan(params)
    except PlanError as error:
        if page:
            html_page.write(page, cards.of_plan(error.plan, params, what=what, problems=error.problems))
        raise
    if page:
        html_page.write(page, cards.of_plan(plan, params, what=what))
    return plan


COMMAND = Command("plan", "Show what would be written from what; touches no weight.", add, run)

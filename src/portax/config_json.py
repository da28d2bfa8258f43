"""The hub's `config.json` that goes with exported tensors."""

import collections
from collections.abc import Mapping
from typing import Any

from portax.base import BaseConverter
from portax.errors import ConfigError
from portax.plan import Plan


def check(hub_config: Mapping[str, Any], converter: BaseConverter, plan: Plan) -> None:
    """Raises a `ConfigError` unless a hub's `config.json` asks for exactly the tensors that are planned."""
    hub = type(converter)(hub_config, layout=converter.layout, wrapper=converter.wrapper)
    expected = {entry.name: entry.shape for entry in hub.plan(hub.expected_tree(scanned=False)).entries}
    planned = {entry.name: entry.shape for entry in plan.entries}
    if odd := [name for name in {**planned, **expected} if planned.get(name) != expected.get(name)]:
        has = [str(list(found[odd[0]])) if odd[0] in found else "nothing" for found in (expected, planned)]
        raise ConfigError(
            f"the hub config is of another model: {len(odd)} tensors differ, such as {odd[0]}, for which it has "
            f"{has[0]} and the plan {has[1]}"
        )


def with_dtype(hub_config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The same config, with the dtype that most bytes are written in."""
    nbytes: collections.Counter[str] = collections.Counter()
    for entry in plan.entries:
        nbytes[entry.dtype.name] += entry.nbytes
    dtype = {"dtype": nbytes.most_common(1)[0][0]}
    inner = hub_config.get("text_config")
    nested = {"text_config": {**inner, **dtype}} if isinstance(inner, Mapping) else {}
    return {**{key: value for key, value in hub_config.items() if key != "torch_dtype"}, **nested, **dtype}

"""The hub's `config.json` of exported tensors."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from portax._text.tables import plural
from portax.checkpoints.quantization_config import quantization_config
from portax.converters import read_config
from portax.converters.base import BaseConverter
from portax.errors import ConfigError
from portax.layouts import Layout
from portax.planning.plan import Plan

_QUANTIZATION = ("quantization_config", "compression_config")  # what loaders go by


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a hub's `config.json`.

    Raises:
        ConfigError: The file cannot be read, is none, or is of a model that no converter knows.
    """
    read_config(path)  # for its errors
    content = json.loads(pathlib.Path(path).read_text())
    if "model_type" not in content:
        raise ConfigError(f"{path}: has no model_type, so it is no hub config.json")
    return content


def is_hub_config(path: str | os.PathLike) -> bool:
    """Tells whether a model's configuration is the hub's, and not the trainer's.

    Raises:
        ConfigError: It cannot be read, or is of a model that no converter knows.
    """
    if pathlib.Path(path).suffix != ".json":
        return False
    read_config(path)  # for its errors
    return "model_type" in json.loads(pathlib.Path(path).read_text())


def field(hub_config: Mapping[str, Any], name: str) -> Any:
    """Returns a field of the language model's part of a `config.json`, or else of the whole; None if neither has it."""
    inner = hub_config.get("text_config") or {}
    return inner[name] if inner.get(name) is not None else hub_config.get(name)


@contextlib.contextmanager
def in_folder(hub_config: Mapping[str, Any], plan: Plan) -> Iterator[pathlib.Path]:
    """Makes a temporary folder with `config.json` alone, for libraries that get the weights in another way."""
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps(with_dtype(hub_config, plan))
        (pathlib.Path(folder) / "config.json").write_text(content)
        yield pathlib.Path(folder)


def check(hub_config: Mapping[str, Any], converter: BaseConverter, plan: Plan) -> None:
    """Raises a `ConfigError` unless a hub's `config.json` asks for exactly the planned tensors."""
    _check_quantization(hub_config, converter, plan)
    read_off = converter.read_config(hub_config)
    if read_off.decoder_block not in converter.decoder_blocks:
        raise ConfigError(
            f"the hub config is of another model: of the family {read_off.decoder_block}, and the weights are of "
            f"{converter.config.decoder_block}"
        )
    _check_rope(read_off.rope_type, converter.config.rope_type)
    config = dataclasses.replace(read_off, rope_type=converter.config.rope_type)  # the trainer's own affair
    hub = type(converter)(config, layout=converter.layout, module_prefix=converter.module_prefix)
    expected = {entry.name: entry.shape for entry in hub.plan(hub.expected_tree(scanned=False)).entries}
    planned = {entry.name: entry.shape for entry in plan.entries}
    if odd := [name for name in {**planned, **expected} if planned.get(name) != expected.get(name)]:
        has = [str(list(found[odd[0]])) if odd[0] in found else "nothing" for found in (expected, planned)]
        raise ConfigError(
            f"the hub config is of another model: {plural(len(odd), 'tensor differs', 'tensors differ')}, such as "
            f"{odd[0]}, for which it has {has[0]} and the plan {has[1]}"
        )


def _check_rope(hub: str, trainer: str) -> None:
    """Of a Llama, unscaled frequencies also tell the order of rotary pairs."""
    if hub and trainer and hub != trainer and "default" in (hub, trainer):
        raise ConfigError(
            f"the hub config is of another model: by its rotary frequencies rope_type is {hub!r}, and the trainer's "
            f"config says {trainer!r}"
        )


def _check_quantization(hub_config: Mapping[str, Any], converter: BaseConverter, plan: Plan) -> None:
    named = next((name for name in _QUANTIZATION if field(hub_config, name) is not None), None)
    if named is None:
        return
    method = field(hub_config, named)
    if (made := quantization_config(converter.layout, plan)) is not None:
        if method != made:
            raise ConfigError(
                f"the hub config says {named}={method}, and the tensors are quantised as {made}: pass the config.json "
                "of the model before it was quantised, and this is added"
            )
        return
    what = f" ({method['quant_method']})" if isinstance(method, Mapping) and "quant_method" in method else ""
    dtypes = ", ".join(sorted({entry.dtype.name for entry in plan.entries}))
    raise ConfigError(
        f"the hub config says {named}{what}, and the tensors are not quantised: they are in {dtypes}, and a loader "
        f"would take them for quantised ones. Take {named} out of the config.json, or pass that of the model before "
        "it was quantised"
    )


def with_quantization(hub_config: Mapping[str, Any], layout: Layout, plan: Plan) -> dict[str, Any]:
    """Returns the config with `quantization_config`, by which loaders know quantised tensors, if there are any."""
    made = quantization_config(layout, plan)
    return {**hub_config, **({} if made is None else {_QUANTIZATION[0]: made})}


def with_dtype(hub_config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Returns the config with the dtype of most bytes of the tensors that are not quantised."""
    nbytes: collections.Counter[str] = collections.Counter()
    for entry in plan.entries:
        if entry.dtype.itemsize > 1 and not entry.refuses_values:
            nbytes[entry.dtype.name] += entry.nbytes
    dtype = {"dtype": nbytes.most_common(1)[0][0]}
    inner = hub_config.get("text_config")
    nested = {"text_config": {**inner, **dtype}} if isinstance(inner, Mapping) else {}
    return {**{key: value for key, value in hub_config.items() if key != "torch_dtype"}, **nested, **dtype}

"""Which converter a configuration asks for: portax's own, and those that other packages register."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from portax.config.model_config import ModelConfig
from portax.converters.base import BaseConverter
from portax.converters.gemma3 import Gemma3Converter
from portax.converters.gemma4 import Gemma4Converter
from portax.converters.gemma4_small import Gemma4SmallConverter
from portax.converters.llama import LlamaConverter
from portax.converters.maxtext import MaxTextConverter
from portax.converters.qwen2 import Qwen2Converter
from portax.converters.qwen3 import Qwen3Converter
from portax.converters.qwen3_5 import Qwen3_5Converter
from portax.converters.qwen3_next import Qwen3NextConverter
from portax.errors import ConfigError
from portax.layouts import Layout

ENTRY_POINTS = "portax.converters"

_OWN: tuple[type[BaseConverter], ...] = (
    Qwen2Converter,
    Qwen3Converter,
    Qwen3NextConverter,
    Qwen3_5Converter,
    LlamaConverter,
    Gemma3Converter,
    Gemma4Converter,
    Gemma4SmallConverter,
)


def converter_for(
    config: Any,
    *,
    layout: Layout | None = None,
    mesh: Mesh | None = None,
    module_prefix: str | None = None,
    strict_dtype: bool = False,
    leave: Sequence[str] = (),
) -> BaseConverter:
    """The converter for a model, chosen by what its config says (`decoder_block`), never by the model's name.

    An engine that runs MaxText's own model takes any decoder: one that no family is for goes by structure alone.

    Args:
        config: Anything that `ModelConfig.of` reads: a MaxText config object, a mapping, a YAML or `config.json` path.
        layout: How the engine holds weights; None reads it off `config.rollout_tensor_parallelism` and the installed
            tpu-inference.
        mesh: Where results go, partitioned as the layout says; None leaves them where they were computed.
        module_prefix: What the engine's model class wraps its language model in; None for the family's usual one.
        strict_dtype: Whether a cast that loses precision is an error.
        leave: Patterns of `fnmatch` for whole paths of leaves that the engine has no place for and that are left out.

    Returns:
        The converter.

    Raises:
        ConfigError: The configuration is incomplete or of an unknown family.
        LayoutError: There is no layout, or the mesh does not fit it.

    Example:
        >>> portax.converter_for("qwen3-8b.yml", layout=portax.layouts.TpuInference(version="0.32", tp=4))
    """
    config = ModelConfig.of(config)
    known = families()
    options: dict[str, Any] = {"layout": layout, "module_prefix": module_prefix, "strict_dtype": strict_dtype}
    options["leave"] = leave
    if config.decoder_block not in known and isinstance(layout, Layout) and layout.names == "trainer":
        return MaxTextConverter(config, mesh, **options)
    if config.decoder_block not in known:
        listed = ", ".join(f"{block} ({family.__name__})" for block, family in known.items())
        raise ConfigError(
            f"decoder_block={config.decoder_block!r} has no converter; known: {listed}. "
            f"A package can register one under the entry point group {ENTRY_POINTS!r}"
        )
    return known[config.decoder_block](config, mesh, **options)


def families() -> dict[str, type[BaseConverter]]:
    """Every known converter by the `decoder_block` that it is for.

    Raises:
        ConfigError: A registered converter cannot be loaded or is none, or two are for the same `decoder_block`.
    """
    known: dict[str, type[BaseConverter]] = {}
    for family in (*_OWN, *_registered()):
        for block in family.decoder_blocks:
            if block in known and known[block] is not family:
                raise ConfigError(
                    f"decoder_block={block!r} has two converters, {_origin(known[block])} and {_origin(family)}: "
                    "uninstall one of the packages, or use the class itself"
                )
            known[block] = family
    return known


def _registered() -> list[type[BaseConverter]]:
    return [_load(entry) for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)]


def _load(entry: importlib.metadata.EntryPoint) -> type[BaseConverter]:
    where = f"entry point {entry.name} = {entry.value}" + (f" of {entry.dist.name}" if entry.dist else "")
    try:
        family = entry.load()
    except Exception as error:
        raise ConfigError(f"{where}: cannot be loaded ({error!r})") from error
    if not (isinstance(family, type) and issubclass(family, BaseConverter) and family.decoder_blocks):
        raise ConfigError(f"{where}: is no subclass of portax.BaseConverter that names its decoder_blocks")
    return family


def _origin(family: type[BaseConverter]) -> str:
    return f"{family.__module__}.{family.__qualname__}"

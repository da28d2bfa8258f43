"""Converters, one file per model family, and the choice between them."""

from typing import Any

from jax.sharding import Mesh

from portax.base import BaseConverter
from portax.config import ModelConfig
from portax.errors import ConfigError
from portax.layouts import Layout
from portax.models.qwen3 import Qwen3Converter

_FAMILIES: tuple[type[BaseConverter], ...] = (Qwen3Converter,)


def converter_for(
    config: Any,
    *,
    layout: Layout,
    mesh: Mesh | None = None,
    wrapper: str | None = None,
    strict_dtype: bool = False,
) -> BaseConverter:
    """The converter for a model, chosen by what its config says (`decoder_block`), never by the model's name.

    Args:
        config: Anything that `ModelConfig.of` reads: a MaxText config object, a mapping, a YAML or `config.json` path.
        layout: How the engine holds weights.
        mesh: Where results go, partitioned as the layout says; None leaves them where they were computed.
        wrapper: What the engine's model class wraps its language model in; None for the family's usual one.
        strict_dtype: Whether a cast that loses precision is an error.

    Returns:
        The converter.

    Raises:
        ConfigError: The configuration is incomplete or of an unknown family.
        LayoutError: The mesh does not fit the layout.

    Example:
        >>> portax.converter_for("qwen3-8b.yml", layout=portax.layouts.TpuInference(version="0.32", tp=4))
    """
    config = ModelConfig.of(config)
    for family in _FAMILIES:
        if config.decoder_block in family.decoder_blocks:
            return family(config, mesh, layout=layout, wrapper=wrapper, strict_dtype=strict_dtype)
    known = ", ".join(f"{block} ({family.__name__})" for family in _FAMILIES for block in family.decoder_blocks)
    raise ConfigError(f"decoder_block={config.decoder_block!r} has no converter; known: {known}")


__all__ = ["Qwen3Converter", "converter_for"]

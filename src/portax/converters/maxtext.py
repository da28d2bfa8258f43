"""`MaxTextConverter`: any MaxText decoder, by structure alone, for an engine that runs MaxText's own model."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from portax.converters.decoder import PlainDecoder
from portax.converters.structure import named_blocks
from portax.errors import ConfigError, Problem
from portax.trainer.layer_params import Axes, LayerParams
from portax.weights.blocks import Blocks

_ROUTER_BIAS_APART = ("deepseek", "deepseek4")
_SOME_ROUTERS_HASH = ("deepseek4",)  # and have no bias, whatever routed_bias says
_NO_ROUTER_BIAS = (
    "nothing",
    "the router's bias, because the config says routed_bias=True",
    "MaxText keeps it in a MoEBiasVar, which is no nnx.Param: hand over nnx.state(model), or nnx.state(model, "
    "(nnx.Param, MoEBiasVar))",
)


class MaxTextConverter(PlainDecoder):
    """Feeds an engine that runs MaxText's own model with the tree of any MaxText decoder, custom blocks included.

    It knows structure alone: which layers are stacked, which kernels an engine fuses, pads or repeats. It takes the
    tree as it is, so a leaf that is missing shows only against the engine's leaves; a family's converter checks every
    leaf against the config.

    Example:
        >>> layout = portax.layouts.MaxTextVllm(version="0.2.5", tp=4)
        >>> portax.MaxTextConverter(config, layout=layout).plan(params).entries[0].name
        'model.decoder.decoder_norm.scale'
    """

    by_structure = True

    def check_config(self) -> None:
        """Raises a `ConfigError` for an engine that holds weights under the hub's names."""
        if self.layout.names != "trainer":
            raise ConfigError(
                f"MaxTextConverter knows the trainer's names alone, and {type(self.layout).__name__} holds weights "
                f"under the hub's: decoder_block={self.config.decoder_block!r} needs the converter of its family"
            )

    def global_weights(self, model: LayerParams) -> Blocks:
        """Whatever stands outside the layers."""
        return named_blocks(model, model.paths)

    def layer_blocks(self, layer: LayerParams) -> Blocks:
        """Whatever the layer has; a router's bias must be there if the config says that there is one."""
        if self.config.routed_bias and self.config.decoder_block not in _SOME_ROUTERS_HASH:
            biases = [
                path.removesuffix("kernel") + "bias" for path in layer.paths if f"/{path}".endswith("/gate/kernel")
            ]
            layer.problems += [Problem(path, *_NO_ROUTER_BIAS) for path in biases if path not in layer]
        return named_blocks(layer, layer.paths)

    def scan_axis(self, path: str) -> int:
        """Returns the first scan axis: 0 for DeepSeek's router bias, a `MoEBiasVar`, which `nnx.scan` stacks apart."""
        if path.endswith("gate/bias") and self.config.decoder_block in _ROUTER_BIAS_APART:
            return 0
        return super().scan_axis(path)

    def expected_tree(
        self,
        *,
        scanned: bool = True,
        dtype: Any = np.float32,
        partition: Callable[[Axes], Sharding] | None = None,
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Raises a `ConfigError`: the configuration does not imply the tree of any decoder."""
        del scanned, dtype, partition
        raise ConfigError(
            f"MaxTextConverter takes the tree as it is and cannot tell it from decoder_block="
            f"{self.config.decoder_block!r}: pass params (arrays or shapes)"
        )

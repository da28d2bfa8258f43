"""Checks that what a conversion cuts off as padding is zero, before anything is written."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portax.config.model_config import ModelConfig
from portax.errors import PlanError, Problem
from portax.execution.sharding import automatic_axes, is_on_host
from portax.planning.jax_context import fetch
from portax.trainer.padding import Padding
from portax.trainer.param_tree import ParamTree


def check_padding(tree: ParamTree, padded: dict[str, Padding], config: ModelConfig) -> None:
    """Raises a `PlanError` if padding holds anything but zeros.

    Args:
        tree: The trainer's weights.
        padded: The padding of every leaf that has one, by path below the root.
        config: The model's configuration.
    """
    found = {path: _any(tree.leaves[path], padding) for path, padding in padded.items()}
    wrong = [path for path, flag in fetch(found).items() if flag]
    if wrong:
        raise PlanError(_problem(tree.root + path, padded[path], config) for path in wrong)


def _any(leaf: Any, padding: Padding) -> Any:
    """Tells whether the padding of one leaf has a value that is not zero; computed on the leaf's devices."""
    if isinstance(leaf, jax.Array) and not is_on_host(leaf.sharding):
        return _any_on_device(automatic_axes(leaf), padding)
    if isinstance(leaf, jax.Array):
        leaf = fetch(leaf)
    return any(bool(np.any(leaf[place] != 0)) for place in padding.places)


@functools.partial(jax.jit, static_argnums=1)
def _any_on_device(leaf: jax.Array, padding: Padding) -> jax.Array:
    return jnp.stack([jnp.any(leaf[place] != 0) for place in padding.places]).any()


def _problem(path: str, padding: Padding, config: ModelConfig) -> Problem:
    cause = "the trainer's vocabulary is larger than the config's vocab_size: the config is of another model"
    if padding.held == config.padded_base_moe_mlp_dim:
        cause = (
            "the experts were trained, or initialised, at the padded width: then moe_mlp_dim is that width; or each "
            "shard's slice was padded apart"
        )
    return Problem(
        path,
        f"values that are not zero past {padding.true} of {padding.held} on axis {padding.axis}",
        f"padding, all zeros, which is cut off: the config's size is {padding.true}",
        cause,
    )

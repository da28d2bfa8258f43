"""Differences between the versions of JAX that are supported."""

import jax

NAMES_EVERY_SHARDING = jax.__version_info__ >= (0, 10)
"""True if JAX can name every sharding of a result that XLA may choose; 0.9 lacks some, such as half a mesh's axis."""

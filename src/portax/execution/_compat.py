"""Differences between the versions of JAX that are supported."""

import jax

NAMES_EVERY_SHARDING = jax.__version_info__ >= (0, 10)
"""Whether JAX has a name for every way in which XLA may spread a result; 0.9 lacks some, such as half a mesh's axis."""

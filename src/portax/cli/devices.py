"""Simulated devices: several on one CPU, as a mesh of accelerators would be."""

import os

import jax


def simulate(count: int) -> None:
    """Makes JAX see so many devices; call it before JAX looks for any."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's advice on partitioning is about tiny arrays here
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)

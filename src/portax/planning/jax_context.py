"""A JAX context of portax's own, whatever its caller has set."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

_P = ParamSpec("_P")
_T = TypeVar("_T")
_END = object()


@contextlib.contextmanager
def own_context() -> Iterator[None]:
    """Runs the block as if the caller had set no mesh, and no switch that changes how programs are made or run.

    Trainers call from inside `jax.set_mesh(...)`, whose devices need not be the engine's, with `jax.disable_jit()` or
    with checks that stop at the first NaN; none of these concern moving weights. Transfer guards stay as they are: each
    transfer that a caller asks for is allowed where it happens.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(jax.set_mesh(_no_mesh()))
        except ValueError:  # inside a transformation, where only shapes are of use
            stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), ())))
        stack.enter_context(jax.disable_jit(False))
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.debug_infs(False))
        stack.enter_context(jax.check_tracer_leaks(False))
        stack.enter_context(jax.no_tracing(False))
        stack.enter_context(jax.no_execution(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.default_device(None))
        yield


@functools.cache
def _no_mesh() -> Mesh:
    return Mesh(np.empty((), object), ())


def in_own_context(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes a function run in `own_context`."""

    @functools.wraps(function)
    def inside(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with own_context():
            return function(*args, **kwargs)

    return inside


def each_in_own_context(iterator: Iterator[_T]) -> Iterator[_T]:
    """Makes every step of an iterator run in `own_context`, and nothing between the steps."""
    while True:
        with own_context():
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]


def fetch(arrays: Any) -> Any:
    """Returns arrays as host arrays, also where a trainer forbids transfers: for results that are wanted on the host.

    Args:
        arrays: One array, or a tree of them.
    """
    with jax.transfer_guard_device_to_host("allow"):
        return jax.device_get(arrays)

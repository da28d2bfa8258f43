"""MaxText's `MaxTextTrainingEngine` with a portax converter. Tried with maxtext 0.2.5; imports nothing of it.

In `prepare_weight_sync` the engine calls `convert(src_pytree, target_state=None)` of its weight converter, and gives
the result to a transport. For a rollout in the same process see `portax.integrations.tunix`.
"""

from typing import Any

from jax.sharding import Mesh

from portax.converters.base import BaseConverter, Weights
from portax.errors import SyncError
from portax.sync.staging import Staging
from portax.trainer.flatten import flatten
from portax.trainer.param_tree import Params

_ROOT, _BASE = "model", "base"


class WeightConverter:
    """A converter with the signature of MaxText's.

    Its results stay in the same buffers from one call to the next: a transport registers them once, and must release
    them (`release_weight_sync`) before the next call.
    """

    def __init__(self, converter: BaseConverter, mesh: Mesh):
        """Makes a weight converter.

        Args:
            converter: The converter for the rollout engine.
            mesh: The trainer's devices, with the axes that the rollout engine's specs name.

        Raises:
            LayoutError: The mesh does not fit the layout.
        """
        self._converter = converter
        self._staging = Staging(converter, mesh)
        self._checked: Any = None

    def convert(self, src_pytree: Params, target_state: Any = None) -> dict[str, Any]:
        """Returns the rollout engine's leaves as its transport names them: of MaxText's own model a tree below `base`.

        All others are flat, by full name, as tpu-inference has them.

        Args:
            src_pytree: The trainer's parameters, as for `converter.convert`.
            target_state: The rollout engine's leaves, or their shapes, to check the results against, in the same form.

        Raises:
            PlanError: As for `converter.plan`.
        """
        if target_state is not None and target_state is not self._checked:
            self._converter.plan(src_pytree, self._by_full_name(target_state))
            self._checked = target_state
        weights = self._staging.stage(src_pytree)
        return weights if self._converter.layout.names == "hub" else _below_base(weights)

    def _by_full_name(self, target: Any) -> Any:
        if self._converter.layout.names == "hub" or _BASE not in target:
            return target
        return {".".join((_ROOT, *path[1:])): leaf for path, leaf in flatten(target)}


def _below_base(weights: Weights) -> dict[str, Any]:
    """Returns what tpu-inference's transport sees of MaxText's own model: its variables, under `base` for `model`."""
    from flax import nnx  # MaxText's own dependency, not ours

    paths: Any = {tuple(name.split(".")): nnx.Param(leaf) for name, leaf in weights.items()}
    return {_BASE: nnx.State.from_flat_path(paths)[_ROOT]}


def install(engine: Any, converter: BaseConverter, mesh: Mesh) -> WeightConverter:
    """Makes a training engine convert with portax.

    Args:
        engine: A `MaxTextTrainingEngine`.
        converter: As for `WeightConverter`.
        mesh: As for `WeightConverter`.

    Returns:
        The converter that the engine calls from now on.

    Raises:
        LayoutError: The mesh does not fit the layout.
        SyncError: The engine has no weight converter to replace.

    Example:
        >>> install(engine, converter, Mesh(trainer_devices.reshape(-1, tp), ("data", "model")))
        >>> engine.prepare_weight_sync()
    """
    for name in ("_weight_converter", "_use_weight_converter"):
        if not hasattr(engine, name):
            raise SyncError(
                f"a {type(engine).__name__} without {name}: expected MaxText's MaxTextTrainingEngine, as in 0.2.5"
            )
    engine._weight_converter = WeightConverter(converter, mesh)
    engine._use_weight_converter = True
    return engine._weight_converter

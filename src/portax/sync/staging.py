"""`Staging`: a trainer-side copy in the engine's layout, for transports that move bytes themselves."""

from typing import Any

import jax
from jax.sharding import Mesh

from portax.converters.base import BaseConverter, Weights
from portax.execution.byte_counts import byte_count
from portax.sync.weight_sync import WeightSync
from portax.trainer import param_tree
from portax.trainer.param_tree import Params


class Staging:
    """Keeps one copy of the weights in the engine's layout, on the trainer's devices, always in the same buffers.

    A transport (an RDMA engine, a reshard between pods) registers the buffers once and sends them after every `stage`.

    Attributes:
        weights: The staged leaves by the engine's names; empty before the first `stage`.

    Example:
        >>> staging = portax.Staging(converter, mesh)
        >>> buffers = staging.stage(params)
        >>> staging.manifest()[0]["name"]
        'vllm_model.lm_head.weight'
    """

    def __init__(self, converter: BaseConverter, mesh: Mesh, *, bucket_bytes: int = 2**30):
        """Makes an empty staging area.

        Args:
            converter: The converter for the engine.
            mesh: The trainer's devices, with the axes that the engine's specs name.
            bucket_bytes: Most bytes in work at a time, as for `WeightSync`.

        Raises:
            ConfigError: `bucket_bytes` is no number of bytes.
            LayoutError: The mesh does not fit the layout.
        """
        self._bucket_bytes = byte_count("bucket_bytes", bucket_bytes)
        self.weights: Weights = {}
        self._converter = converter.on(mesh)
        self._sync: WeightSync | None = None

    def stage(self, params: Params) -> Weights:
        """Fills the staged leaves with these parameters: the first call makes the buffers, later calls reuse them.

        Args:
            params: As for `converter.convert`.

        Raises:
            PlanError: As for `convert`.
        """
        if self._sync is None:
            self.weights |= jax.block_until_ready(self._converter.convert(params))
            self._sync = WeightSync(self._converter, self.weights, bucket_bytes=self._bucket_bytes)
        else:
            self._sync(params)
        return self.weights

    def manifest(self) -> list[dict[str, Any]]:
        """Describes the staged leaves for the other side, as JSON: name, shape, dtype, spec and bytes, sorted by name.

        It follows from the configuration and the layout alone, so two processes that build it get the same.
        """
        if self._sync is not None:
            plan = self._sync.plan
        else:
            plan = self._converter.plan(param_tree.read(self._converter.expected_tree()))
        return [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": entry.dtype.name,
                "spec": list(entry.spec),
                "bytes": entry.nbytes,
            }
            for entry in sorted(plan.entries, key=lambda entry: entry.name)
        ]

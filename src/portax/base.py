"""`BaseConverter`: the pipeline from a trainer's parameters to an engine's weights, and the hooks of a model family."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from portax import blocks, execute, trainer_state
from portax.config import ModelConfig
from portax.errors import ConfigError, LayoutError
from portax.layouts import Layout, TpuInference
from portax.leaves import Leaves
from portax.plan import Plan
from portax.planning import make_plan
from portax.tracing import hold

Blocks: TypeAlias = tuple[blocks.Block, ...]
Weights: TypeAlias = dict[str, Shaped[Array, "..."]]


class BaseConverter(abc.ABC):
    """Turns the parameters of one model family into what an engine holds.

    `convert` is the pipeline: the global weights, then for every layer its attention, its norms, and its MLP or MoE.
    A family overrides the hooks that say what each weight *is*; each sees one layer, unscanned, and returns blocks. How
    an engine holds a block is the layout's business, and where scanned layers are is `trainer_state`'s.

    Attributes:
        decoder_blocks: MaxText's `decoder_block` values that this class converts.
        default_wrapper: What the engine's usual model class wraps its language model in.
        config: The model's configuration.
        layout: How the engine holds weights.
        mesh: Where results go; None leaves them where they were computed.
        wrapper: What this engine's model class wraps its language model in, e.g. `language_model.`.
        strict_dtype: Whether a cast that loses precision is an error.
    """

    decoder_blocks: ClassVar[tuple[str, ...]] = ()
    default_wrapper: ClassVar[str] = ""

    def __init__(
        self,
        config: Any,
        mesh: Mesh | None = None,
        *,
        layout: Layout | None = None,
        wrapper: str | None = None,
        strict_dtype: bool = False,
    ):
        """Makes a converter.

        Args:
            config: Anything that `ModelConfig.of` reads.
            mesh: Where results go.
            layout: How the engine holds weights; None reads it off `config.rollout_tensor_parallelism` and the
                installed tpu-inference.
            wrapper: None for `default_wrapper`.
            strict_dtype: Whether a cast that loses precision is an error.

        Raises:
            ConfigError: The configuration is not usable for this family.
            LayoutError: The layout cannot be read, or the mesh does not fit it.
        """
        self.config = ModelConfig.of(config)
        self.mesh = mesh
        self.layout = layout if layout is not None else _rollout_layout(self.config)
        self.wrapper = self.default_wrapper if wrapper is None else wrapper
        self.strict_dtype = strict_dtype
        self._plans: dict[Any, Plan] = {}
        self._executor = execute.Executor(self, mesh)
        if self.config.decoder_block not in self.decoder_blocks:
            raise ConfigError(
                f"decoder_block={self.config.decoder_block!r} is not for {type(self).__name__}, "
                f"which converts {', '.join(self.decoder_blocks)}"
            )
        _check_mesh(mesh, self.layout)

    def global_weights(self, model: Leaves) -> Blocks:
        """Embedding, final norm and output projection."""
        table = model.read("token_embedder/embedding", "vocab_size emb_dim")
        if self.config.logits_via_embedding:
            head: blocks.Block = blocks.TiedLMHead(table, to="embed_tokens", shared_module=True)
        else:
            head = blocks.LMHead(model.read("decoder/logits_dense/kernel", "emb_dim vocab_size"))
        norm = model.read("decoder/decoder_norm/scale", "emb_dim")
        return blocks.Embedding("embed_tokens", table), blocks.Param("norm.weight", norm), head

    @abc.abstractmethod
    def attention(self, layer: Leaves) -> Blocks:
        """Projections of one attention layer and the norms within it."""

    @abc.abstractmethod
    def norms(self, layer: Leaves) -> Blocks:
        """Norms around attention and MLP."""

    def mlp(self, layer: Leaves) -> Blocks:
        """A gated MLP."""
        if "mlp/wi/kernel" in layer:
            gate, up = _halves(layer.read("mlp/wi/kernel", "emb_dim 2 mlp_dim"), axis=1)
        else:
            gate = layer.read("mlp/wi_0/kernel", "emb_dim mlp_dim")
            up = layer.read("mlp/wi_1/kernel", "emb_dim mlp_dim")
        return (
            blocks.MergedLinear("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), ((gate,), (up,))),
            blocks.Linear("mlp.down_proj", layer.read("mlp/wo/kernel", "mlp_dim emb_dim"), "row"),
        )

    def moe(self, layer: Leaves) -> Blocks:
        """Router and experts of a mixture-of-experts layer."""
        raise NotImplementedError(f"{type(self).__name__} says nothing of mixture-of-experts layers")

    def layer_blocks(self, layer: Leaves) -> Blocks:
        """All of one layer."""
        feed_forward = self.moe(layer) if self.config.num_experts > 1 else self.mlp(layer)
        return self.attention(layer) + self.norms(layer) + feed_forward

    def experts(self, layer: Leaves, path: str, name: str, *, hub: Literal["each", "stacked"]) -> blocks.FusedMoE:
        """The routed experts below `path`, gate and up apart or pre-fused.

        Args:
            layer: The layer.
            path: Where the trainer has them, e.g. `moe_block`.
            name: Module name on the hub, e.g. `mlp.experts`.
            hub: How the hub stores them; see `blocks.FusedMoE`.
        """
        if f"{path}/wi" in layer:
            gate, up = jnp.split(layer.read(f"{path}/wi", "num_experts emb_dim 2*moe_mlp_dim"), 2, axis=2)
        else:
            gate = layer.read(f"{path}/wi_0", "num_experts emb_dim moe_mlp_dim")
            up = layer.read(f"{path}/wi_1", "num_experts emb_dim moe_mlp_dim")
        return blocks.FusedMoE(name, gate, up, layer.read(f"{path}/wo", "num_experts moe_mlp_dim emb_dim"), hub)

    def plan(self, params: Any, target: Mapping[str, Any] | None = None, *, strict_dtype: bool | None = None) -> Plan:
        """What `convert` would write from what; no weight is touched, no memory spent.

        Args:
            params: What the trainer hands over, or the same with `jax.ShapeDtypeStruct` leaves.
            target: A live engine's state (names, shapes, dtypes, shardings) to check the plan against.
            strict_dtype: Whether a cast that loses precision is an error; None for the converter's own setting.

        Returns:
            The plan; printed, it is a table.

        Raises:
            PlanError: Anything is missing, left over, of another shape or kind. Names everything at once.
        """
        state = trainer_state.read(params)
        return self._plan(state, self._sections(state), target, strict_dtype)

    def convert(self, params: Any, *, strict_dtype: bool | None = None) -> Weights:
        """All of the engine's weights.

        The first call plans and compiles one program for each kind of layer; later calls compile nothing. Keep the
        converter: its programs go with it.

        Args:
            params: `nnx.State`, nested or flat mapping, FrozenDict; arrays of JAX or numpy; scanned or not.
            strict_dtype: Whether a cast that loses precision is an error; None for the converter's own setting.

        Returns:
            The engine's leaves by full name, with the engine's shapes, dtypes and, on the converter's mesh, specs.

        Raises:
            PlanError: As `plan`; before any weight is touched.
        """
        weights: Weights = {}
        for bucket in self._buckets(params, None, strict_dtype):
            weights |= bucket
        return weights

    def stream(self, params: Any, *, bucket_bytes: int) -> Iterator[Weights]:
        """The engine's weights in buckets, each converted when it is asked for.

        Args:
            params: As for `convert`.
            bucket_bytes: Bytes of one bucket; a leaf that is larger is a bucket of its own.

        Yields:
            Finished weights by name; every leaf comes once.

        Raises:
            PlanError: As `plan`; before the first bucket.
        """
        return self._buckets(params, bucket_bytes, None)

    def expected_tree(self, *, scanned: bool = True, dtype: Any = np.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """The trainer's tree that the configuration implies, for planning without one.

        Args:
            scanned: Whether layers are stacked.
            dtype: Dtype of every leaf.

        Returns:
            Shapes by path.
        """
        depth = self.config.num_decoder_layers
        model, layer = Leaves({}, self.config), Leaves({}, self.config, scan=(depth,) if scanned else ())
        jax.eval_shape(lambda: (hold(self, model, is_global=True), hold(self, layer, is_global=False)))
        containers = ["decoder/layers"] if scanned else [f"decoder/layers_{i}" for i in range(depth)]
        shapes = model.expected | {f"{at}/{path}": shape for at in containers for path, shape in layer.expected.items()}
        return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}

    def _buckets(self, params: Any, bucket_bytes: int | None, strict_dtype: bool | None) -> Iterator[Weights]:
        state = trainer_state.read(params)
        sections = self._sections(state)
        plan = self._plan(state, sections, None, strict_dtype)
        execute.check_arrays(state)
        return self._executor.run(plan, sections, bucket_bytes)

    def _sections(self, state: trainer_state.TrainerState) -> tuple[trainer_state.Section, ...]:
        return trainer_state.sections(state, self.config.param_scan_axis)

    def _plan(
        self,
        state: trainer_state.TrainerState,
        sections: tuple[trainer_state.Section, ...],
        target: Mapping[str, Any] | None,
        strict_dtype: bool | None,
    ) -> Plan:
        strict = self.strict_dtype if strict_dtype is None else strict_dtype
        if target is not None:
            target = {".".join(path): trainer_state.unbox(leaf) for path, leaf in trainer_state.flatten(target)}
            return make_plan(self, self.wrapper, state, sections, target=target, strict_dtype=strict)
        signature = (strict, state.root, tuple((p, x.shape, np.dtype(x.dtype)) for p, x in state.leaves.items()))
        if signature not in self._plans:
            plan = make_plan(self, self.wrapper, state, sections, target=None, strict_dtype=strict)
            self._plans = {signature: plan}
        return self._plans[signature]


def _halves(fused: Shaped[Array, "..."], *, axis: int) -> list[Shaped[Array, "..."]]:
    return [jnp.squeeze(half, axis) for half in jnp.split(fused, 2, axis)]


def _rollout_layout(config: ModelConfig) -> Layout:
    if config.rollout_tensor_parallelism is None:
        raise LayoutError(
            "no layout: pass layout=portax.layouts.TpuInference(version=..., tp=...), or set "
            "rollout_tensor_parallelism in the trainer's config"
        )
    return TpuInference.installed(tp=config.rollout_tensor_parallelism)


def _check_mesh(mesh: Mesh | None, layout: Layout) -> None:
    if mesh is None:
        return
    for axis, size in layout.mesh_axes.items():
        if mesh.shape.get(axis, 1 if size == 1 else None) != size:
            raise LayoutError(
                f"the mesh has axes {dict(mesh.shape)}, and {layout} cuts weights over {axis}={size}: "
                f"pass the engine's mesh, with an axis {axis!r} of that size"
            )

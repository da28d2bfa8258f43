"""`BaseConverter`: the pipeline from a trainer's parameters to an engine's weights, and the hooks of a model family."""

import abc
import fnmatch
import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Shaped

from portax.config.hub import DENSE, HubConfig, is_hub_config
from portax.config.model_config import ConfigSource, ModelConfig, load
from portax.config.to_hub import TrainerConfig
from portax.converters.structure import TrainerNames
from portax.errors import ConfigError, LayoutError
from portax.execution import executor
from portax.execution.byte_counts import byte_count
from portax.execution.inverse import Restoration
from portax.layouts import Canonical, FlaxNnx, HuggingFace, Layout, MaxTextVllm, NativeModel, TpuInference
from portax.planning.jax_context import in_own_context
from portax.planning.plan import Plan
from portax.planning.planner import make_plan
from portax.planning.trace import Hooks, refusing_values
from portax.trainer import param_tree, scan
from portax.trainer.flatten import Leaf, flatten, unbox
from portax.trainer.layer_params import Axes, LayerParams
from portax.trainer.param_tree import Params, ParamTree
from portax.weights.blocks import Blocks

Weights: TypeAlias = dict[str, Shaped[Array, "..."]]
"""An engine's leaves by full name."""


class BaseConverter(abc.ABC):
    """Turns the parameters of one model family into what an engine holds.

    `convert` is the pipeline: the global weights, then of every layer its attention, its norms, and its MLP or MoE.
    The hooks say what each weight *is*: each sees one layer, unscanned, or the model outside its layers, and returns
    blocks. They know no scan axis, no tensor parallelism, no padding and no engine: the layout decides how an engine
    holds a block.

    A family is one class in one file: the hooks, the names that MaxText and the hub have for it, and the methods that
    read and derive a hub `config.json`. Most derive from `PlainDecoder`.

    Attributes:
        decoder_blocks: MaxText's `decoder_block` values that this class converts.
        hub_types: The hub's `model_type` values that this class reads; of a multimodal model, those of its text part.
        config_class: The class of its configuration, for a family that needs more fields than `ModelConfig` has.
        required: Config fields that must be set for this family.
        default_module_prefix: The module around the language model in the engine's usual model class.
        engine_names: Names of vLLM's class that differ from the hub's: the start of each, `(hub's, vLLM's)`.
        scan_pattern: The way MaxText stacks the layers; None if it never does.
        engine_owned: Patterns of `fnmatch` for the names of leaves that an engine of this family fills itself, such as
            rotary caches, besides those that its layout knows.
        starts_with_bos: True if every prompt must begin with `<bos>`; without it the model generates nonsense.
        config: The model's configuration.
        layout: The engine's layout of weights.
        mesh: The mesh that results go to; None leaves them where they were computed.
        module_prefix: The module around the language model in this engine's model class, e.g. `language_model.`.
        strict_dtype: True makes a cast that loses precision an error.
        by_structure: True if the hooks return the trainer's leaves as they are, of any decoder.
        leave: Patterns of `fnmatch` for whole paths of the trainer's leaves to leave out, such as a vision tower.

    Example:
        >>> weights = converter.convert(params)
        >>> weights["vllm_model.model.layers.0.mlp.down_proj.weight"].shape
        (128, 64)
    """

    decoder_blocks: ClassVar[tuple[str, ...]] = ()
    hub_types: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    required: ClassVar[tuple[str, ...]] = ()
    default_module_prefix: ClassVar[str] = ""
    engine_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    scan_pattern: ClassVar[scan.ScanPattern | None] = scan.ScanPattern()
    engine_owned: ClassVar[tuple[str, ...]] = ()
    starts_with_bos: ClassVar[bool] = False
    by_structure: ClassVar[bool] = False

    def __init__(
        self,
        config: ConfigSource,
        mesh: Mesh | None = None,
        *,
        layout: Layout | None = None,
        module_prefix: str | None = None,
        strict_dtype: bool = False,
        leave: Sequence[str] = (),
    ):
        """Makes a converter.

        Args:
            config: Anything that `read_config` reads.
            mesh: The mesh that results go to.
            layout: The engine's layout of weights; None reads it off `config.rollout_tensor_parallelism` and the
                installed tpu-inference.
            module_prefix: The module around the language model; None for `default_module_prefix`.
            strict_dtype: True makes a cast that loses precision an error.
            leave: Patterns of `fnmatch` for whole paths of leaves to leave out, because the engine has no place for
                them, e.g. `("*/vision_encoder/*",)`; plans and reports list them.

        Raises:
            ConfigError: The configuration is not usable for this family, or `leave` is no sequence of patterns.
            LayoutError: The layout cannot be read, or the mesh does not fit it.
        """
        self.config = type(self).read_config(config)
        self.mesh = mesh
        self.module_prefix = self.default_module_prefix if module_prefix is None else module_prefix
        layout = _checked_layout(layout) if layout is not None else _rollout_layout(self.config)
        self.layout = layout.for_architecture(self.architecture, self.native_model).with_names(self.engine_names)
        self.strict_dtype = strict_dtype
        self.leave = _patterns(leave)
        self._plans: dict[Any, tuple[Plan, tuple[scan.LayerGroup, ...]]] = {}
        self._hooks: Hooks = self
        if self.layout.names == "trainer" and not self.by_structure:
            self._hooks = TrainerNames(self.config, self.layout, self)
        self._executor = executor.Executor(self._hooks, mesh)
        self._check_config()
        _check_mesh(mesh, self.layout)

    @abc.abstractmethod
    def global_weights(self, model: LayerParams) -> Blocks:
        """Returns the weights outside the layers: embedding, final norm, output projection."""

    @abc.abstractmethod
    def attention(self, layer: LayerParams) -> Blocks:
        """Returns the projections of one attention layer, and the norms within it."""

    @abc.abstractmethod
    def norms(self, layer: LayerParams) -> Blocks:
        """Returns the norms around attention and MLP."""

    @abc.abstractmethod
    def mlp(self, layer: LayerParams) -> Blocks:
        """Returns a dense MLP."""

    @abc.abstractmethod
    def moe(self, layer: LayerParams) -> Blocks:
        """Returns the router and the experts of a mixture of experts."""

    def layer_blocks(self, layer: LayerParams) -> Blocks:
        """Returns all blocks of one layer."""
        feed_forward = self.moe(layer) if self.config.num_experts > 1 else self.mlp(layer)
        return (*self.attention(layer), *self.norms(layer), *feed_forward)

    def layer_cycle(self, found: Sequence[scan.LayerSlice]) -> tuple[scan.LayerTypes, ...]:
        """Returns the types of each layer, up to where they repeat; by default all layers are the same.

        Args:
            found: The layers of the trainer's tree, if the config does not say enough; empty when planning without.
        """
        return (frozenset(),)

    def layer_types(self, found: Sequence[scan.LayerSlice], depth: int) -> list[scan.LayerTypes]:
        """Returns the types of each of the first `depth` layers."""
        return list(itertools.islice(itertools.cycle(self.layer_cycle(found)), depth))

    def stacks(self, *, scanned: bool) -> Iterable[tuple[str, tuple[int, ...], int]]:
        """Returns the layers of MaxText's tree, or its stacks of them: container, scan axes, number of the first layer.

        Args:
            scanned: True for a tree whose layers are stacked, if they ever are.
        """
        depth = self.config.num_decoder_layers
        if not scanned or self.scan_pattern is None:
            return scan.unscanned(depth)
        return self.scan_pattern.stacks(depth, len(self.layer_cycle(())))

    @classmethod
    def layer_counts(cls, config: ModelConfig, layers: Sequence[scan.LayerSlice]) -> dict[str, int]:
        """Returns the fields that count layers of one kind, as a tree tells them; by default none.

        Args:
            config: A configuration with the same switches as the tree's; its sizes do not count.
            layers: The layers of the tree.
        """
        del config, layers
        return {}

    @property
    def architecture(self) -> str | None:
        """The hub's name of the model class, for engines with a layout of their own for each class; None if unknown."""
        return None

    @property
    def native_model(self) -> NativeModel | None:
        """The way the engine's native JAX model of this class holds weights, for `FlaxNnx`; None if none was run."""
        return None

    def is_engine_owned(self, name: str) -> bool:
        """Tells whether the engine fills the leaf of this name itself, so that no trainer ever writes it."""
        own = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.engine_owned)
        return own or self.layout.is_engine_owned(name)

    def check_config(self) -> None:  # noqa: B027
        """Raises a `ConfigError` if this family cannot convert the model. `required` fields are already set."""

    @classmethod
    def reads_hub(cls, hub: HubConfig) -> bool:
        """Tells whether a hub `config.json` is of this family; by default its `model_type` decides."""
        return hub.model_type in cls.hub_types

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns the fields of `config_class` that a hub `config.json` gives; by default those of a dense model.

        Fields that are missing or have no place in MaxText are noted in `hub.problems`.
        """
        return {
            "decoder_block": cls.decoder_blocks[0],
            "logits_via_embedding": hub.get("tie_word_embeddings", False),
            **hub.sizes(DENSE),
        }

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json` of a model; by default it refuses.

        Guess nothing on which results depend: `trainer` notes what the trainer's configuration does not say.

        Raises:
            ConfigError: This family has no derivation.
        """
        raise ConfigError(f"no config.json is derived for decoder_block={trainer.config.decoder_block!r}")

    @classmethod
    def read_config(cls, source: ConfigSource) -> ModelConfig:
        """Returns the configuration of a model of this family.

        Args:
            source: Anything that `ModelConfig.of` reads, or a hub `config.json`, as a mapping or a path.

        Raises:
            ConfigError: Fields are missing, of the wrong kind, or contradict each other, or it is of another family.
        """
        source = load(source)
        if not is_hub_config(source):
            return cls.config_class.of(source)
        hub = HubConfig(source)
        if not cls.reads_hub(hub):
            raise ConfigError(
                f"the hub config is of another model than {cls.__name__} converts: its model_type is "
                f"{hub.model_type!r}, and this family's {' or '.join(cls.hub_types) or 'is not stated'}"
            )
        return cls.config_class.build(cls.from_hub(hub), hub.problems)

    @in_own_context
    def plan(
        self, params: Params, target: Mapping[str, Leaf] | None = None, *, strict_dtype: bool | None = None
    ) -> Plan:
        """Plans a conversion: every leaf that `convert` would write, and its sources. Reads no weight.

        Args:
            params: As for `convert`, or the same tree with `jax.ShapeDtypeStruct` leaves.
            target: A live engine's state (names, shapes, dtypes, shardings) to check the plan against.
            strict_dtype: True makes a cast that loses precision an error; None for the converter's own setting.

        Returns:
            The plan; printed, it is a table.

        Raises:
            PlanError: Leaves are missing, left over, or of another shape or dtype. Lists all of them.
        """
        tree = self.read(params)
        strict = self.strict_dtype if strict_dtype is None else strict_dtype
        if target is None:
            return self._planned(tree, strict)[0]
        target = {".".join(path): unbox(leaf) for path, leaf in flatten(target)}
        return make_plan(self._hooks, self.module_prefix, tree, self.groups(tree), target=target, strict_dtype=strict)

    def read(self, params: Params) -> ParamTree:
        """Reads the trainer's parameters as a flat mapping, without those that `leave` names.

        Args:
            params: As for `plan`.

        Raises:
            PlanError: `params` is no tree of arrays, has unknown arrays beside the parameters, or a pattern of `leave`
                matches nothing.
        """
        tree = param_tree.read(params, self.leave)
        param_tree.refuse_strangers(tree)
        return tree

    @in_own_context
    def plan_into(self, target: Mapping[str, Leaf]) -> Plan:
        """Plans a sync into a live engine without a trainer's tree: the configuration implies one.

        Args:
            target: The live engine's state, as for `plan`.

        Raises:
            PlanError: As `plan`.
            ConfigError: The configuration does not say enough for a plan.
        """
        return self.plan(param_tree.read(self.expected_tree()), target)

    @in_own_context
    def convert(self, params: Params, *, strict_dtype: bool | None = None) -> Weights:
        """Converts all weights.

        The first call plans and compiles one program for each kind of layer; later calls compile nothing. Keep the
        converter: its programs go with it.

        Args:
            params: `nnx.State`, nested or flat mapping, FrozenDict, a whole train state, a checkpoint; scanned or not.
            strict_dtype: True makes a cast that loses precision an error; None for the converter's own setting.

        Returns:
            The engine's leaves by full name, with the engine's shapes, dtypes and, on the converter's mesh, specs.

        Raises:
            PlanError: As `plan`; before any weight is touched.
        """
        weights: Weights = {}
        for bucket in self._buckets(params, None, strict_dtype):
            weights |= bucket
        return weights

    def stream(self, params: Params, *, bucket_bytes: int, only: Container[str] | None = None) -> Iterator[Weights]:
        """Converts the weights in buckets, each when it is asked for.

        Args:
            params: As for `convert`.
            bucket_bytes: Bytes of one bucket; a larger leaf is a bucket of its own.
            only: Names of the leaves to convert; None for all.

        Yields:
            Finished weights by name; every leaf comes once, in the order of the plan.

        Raises:
            ConfigError: `bucket_bytes` is no number of bytes.
            PlanError: As `plan`; before the first bucket.
            SyncError: A leaf of the trainer was freed, or donated to another program, between two buckets.

        Example:
            >>> sum(len(bucket) for bucket in converter.stream(params, bucket_bytes=2**16))
            19
        """
        return self._buckets(params, byte_count("bucket_bytes", bucket_bytes), None, only)

    @in_own_context
    def restore(self, weights: Mapping[str, Leaf], *, scanned: bool = True, dtype: Any = None) -> dict[str, np.ndarray]:
        """Restores the trainer's tree from converted weights, such as a hub checkpoint.

        Args:
            weights: Weights in this converter's layout, by full name, such as the tensors of a hub checkpoint; read
                layer by layer.
            scanned: True stacks the layers.
            dtype: Dtype of the leaves; None keeps that of the tensors.

        Returns:
            Host arrays by path, which convert to the same weights again. Leaves that a conversion scales or shifts
            (Gemma's embeddings, some norms) are rounded once more; all others are equal bit for bit.

        Raises:
            PlanError: Tensors are missing, left over, or of another shape or dtype. Lists all of them.
            LayoutError: This layout does not hold every element exactly once, as the hub's does.

        Example:
            >>> hub = portax.converter_for(config, layout=portax.layouts.HuggingFace())
            >>> portax.diff(params, hub.restore(hub.convert(params))).equal
            True
        """
        return self.restoration(weights, scanned=scanned, dtype=dtype).tree()

    @in_own_context
    def restoration(self, weights: Mapping[str, Leaf], *, scanned: bool = True, dtype: Any = None) -> Restoration:
        """Plans a restoration, to run layer by layer, as `import_checkpoint` does.

        Args:
            weights: As for `restore`.
            scanned: As for `restore`.
            dtype: As for `restore`.

        Raises:
            PlanError: As `restore`.
        """
        tree = param_tree.read(self.expected_tree(scanned=scanned))
        plan, groups = self._planned(tree, False)
        return Restoration(self, plan, groups, weights, dtype)

    @in_own_context
    def expected_tree(
        self,
        *,
        scanned: bool = True,
        dtype: Any = np.float32,
        partition: Callable[[Axes], Sharding] | None = None,
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the trainer's tree that the configuration implies, for planning without one.

        Args:
            scanned: True stacks the layers.
            dtype: Dtype of every leaf.
            partition: Returns the sharding of a leaf, given its axes; see `logical_axes.partition`.

        Returns:
            Shapes by path.

        Example:
            >>> converter.expected_tree()["decoder/layers/mlp/wo/kernel"].shape  # [mlp, layers, embed]
            (128, 2, 64)
        """
        types = self.layer_types((), self.config.num_decoder_layers)
        found = self._expected(LayerParams({}, self.config), is_global=True)
        for container, lengths, first in self.stacks(scanned=scanned):
            layer = LayerParams({}, self.config, types=types[first], scan=lengths, scan_axis=self.scan_axis)
            found |= {f"{container}/{path}": axes for path, axes in self._expected(layer).items()}
        return {
            path: jax.ShapeDtypeStruct(
                tuple(size for _, size in axes), dtype, sharding=None if partition is None else partition(axes)
            )
            for path, axes in found.items()
        }

    def _expected(self, leaves: LayerParams, is_global: bool = False) -> dict[str, Axes]:
        hook = self._hooks.global_weights if is_global else self._hooks.layer_blocks
        with refusing_values(self._hooks):
            jax.eval_shape(lambda: jax.tree.leaves(tuple(hook(leaves))))
        return leaves.expected

    def _check_config(self) -> None:
        if not self.by_structure and self.config.decoder_block not in self.decoder_blocks:
            raise ConfigError(
                f"decoder_block={self.config.decoder_block!r} is not for {type(self).__name__}, "
                f"which converts {', '.join(self.decoder_blocks)}"
            )
        if missing := [name for name in self.required if not getattr(self.config, name)]:
            raise ConfigError(f"decoder_block={self.config.decoder_block!r} needs {', '.join(missing)}")
        self.check_config()

    def on(self, mesh: Mesh | None, *, config: ModelConfig | None = None) -> "BaseConverter":
        """Returns the same converter for another mesh, or for another size of the model.

        Args:
            mesh: The mesh that results go to.
            config: Another configuration; None for this one's.

        Raises:
            LayoutError: The mesh does not fit the layout.
        """
        return type(self)(
            config or self.config,
            mesh,
            layout=self.layout,
            module_prefix=self.module_prefix,
            strict_dtype=self.strict_dtype,
            leave=self.leave,
        )

    @in_own_context
    def conversion(self, params: Params, *, strict_dtype: bool | None = None) -> executor.Conversion:
        """Plans a conversion, to run piece by piece, as `WeightSync` does.

        Args:
            params: As for `plan`.
            strict_dtype: As for `plan`.

        Raises:
            PlanError: As `plan`; also for arrays that cannot be read, and for tracers.
        """
        tree = self.read(params)
        param_tree.refuse_tracers(tree)
        plan, groups = self._planned(tree, self.strict_dtype if strict_dtype is None else strict_dtype)
        return executor.Conversion(plan, tree, groups, self._executor)

    def _buckets(
        self,
        params: Params,
        bucket_bytes: int | None,
        strict_dtype: bool | None,
        only: Container[str] | None = None,
    ) -> Iterator[Weights]:
        return self.conversion(params, strict_dtype=strict_dtype).buckets(bucket_bytes, only)

    def scan_axis(self, path: str) -> int:
        """Returns the first scan axis of a stacked leaf, given its path relative to the layer."""
        return self.config.param_scan_axis

    def groups(self, tree: param_tree.ParamTree) -> tuple[scan.LayerGroup, ...]:
        """Returns the layers of a tree, grouped by what they hold.

        Raises:
            PlanError: Stacks of two forms are mixed.
        """
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.leaves.items()}
        return scan.layer_groups(shapes, tree.root, self.scan_axis, self._types_of)

    def _types_of(self, found: Sequence[scan.LayerSlice]) -> list[scan.LayerTypes]:
        numbers = [layer.index or 0 for layer in found]
        known = self.layer_types(found, max(numbers, default=-1) + 1)
        return [known[number] | self.layout.layer_types(number, self.module_prefix) for number in numbers]

    def _planned(self, tree: param_tree.ParamTree, strict: bool) -> tuple[Plan, tuple[scan.LayerGroup, ...]]:
        """Returns the plan of a tree and its groups; a tree like the last one gets the same ones again."""
        leaves = tuple((path, tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in tree.leaves.items())
        signature = (strict, tree.root, tree.ignored, tree.left, leaves)
        if signature not in self._plans:
            groups = self.groups(tree)
            plan = make_plan(self._hooks, self.module_prefix, tree, groups, target=None, strict_dtype=strict)
            self._plans = {signature: (plan, groups)}
        return self._plans[signature]


def _checked_layout(layout: Layout) -> Layout:
    if not isinstance(layout, Layout):
        known = ", ".join(kind.__name__ for kind in (TpuInference, FlaxNnx, MaxTextVllm, HuggingFace, Canonical))
        raise LayoutError(
            f"layout={layout!r} is no layout: pass an object, such as "
            f'portax.layouts.TpuInference(version="0.32", tp=4); there are {known}'
        )
    return layout


def _patterns(leave: Sequence[str]) -> tuple[str, ...]:
    if isinstance(leave, str) or not all(isinstance(pattern, str) for pattern in leave):
        raise ConfigError(f"leave={leave!r}: pass a sequence of patterns, such as leave=('*/vision_encoder/*',)")
    return tuple(leave)


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
    one = math.prod(layout.mesh_axes.values()) == 1
    for axis, size in layout.mesh_axes.items():
        if mesh.shape.get(axis, 1 if one else None) != size:
            raise LayoutError(
                f"the mesh has axes {dict(mesh.shape)}, and {layout} cuts weights over {axis}={size}: "
                f"pass the engine's mesh, with an axis {axis!r} of that size"
            )

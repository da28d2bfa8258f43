"""Identifies the model family and the sizes of a tree from its leaves."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from portax.config import axes
from portax.config.model_config import ModelConfig
from portax.converters.base import BaseConverter
from portax.errors import ConfigError, PortaxError
from portax.layouts import Canonical
from portax.trainer import param_tree
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerGroup
from portax.weights.scale_shift import ScaleShift

_SWITCHES = (
    "inhomogeneous_layer_cycle_interval",
    "num_kv_shared_layers",
    "padded_base_moe_mlp_dim",
    "param_scan_axis",
    "rollout_tensor_parallelism",
    "shared_experts",
)


@dataclasses.dataclass(frozen=True)
class Match:
    """A comparison of a tree with one model family.

    Attributes:
        decoder_block: MaxText's name of the family.
        converter: Its converter.
        sizes: Sizes of the configuration that follow from the leaves.
        untold: Sizes that the family needs and the leaves do not determine.
        scan_axis: First scan axis of stacked leaves.
        config: The configuration, if the leaves determine all of its sizes; other switches are the family's usual ones.
        usual: True if MaxText keeps this family in trees of exactly these paths.
        odd: Leaves that speak against the family: missing, left over, or of a shape that no size explains.
    """

    decoder_block: str
    converter: type[BaseConverter]
    sizes: Mapping[str, int]
    untold: tuple[str, ...]
    scan_axis: int
    config: ModelConfig | None
    usual: bool
    odd: tuple[str, ...]


def identify(
    params: Mapping[str, Any], families: Mapping[str, type[BaseConverter]], examples: Iterable[ModelConfig]
) -> list[Match]:
    """Compares a tree with every family.

    Args:
        params: The trainer's tree, or its shapes.
        families: Converters by `decoder_block`.
        examples: Configurations that show the switches of each family; their sizes do not count. A family without an
            example is tried with and without experts.

    Returns:
        One match for each family that the tree fits, the likeliest first; only the nearest if it fits none.

    Raises:
        PlanError: `params` is no tree of parameters.
    """
    state = param_tree.read(params)
    structures = [*_structures(families, examples)]
    nearest: list[Match] = []
    for axis in (1, 0):
        best: dict[str, Match] = {}
        for structure in structures:
            match = _match(families[structure.decoder_block], structure, state, axis)
            if match is not None and (
                match.decoder_block not in best or _rank(match) < _rank(best[match.decoder_block])
            ):
                best[match.decoder_block] = match
        if fitting := [match for match in best.values() if not match.odd]:
            return sorted(fitting, key=_rank)
        nearest += best.values()
    return sorted(nearest, key=_rank)[:1]


def _rank(match: Match) -> tuple[int, bool, int]:
    return len(match.odd), not match.usual, len(match.untold)


def _structures(families: Mapping[str, type[BaseConverter]], shipped: Iterable[ModelConfig]) -> Iterator[ModelConfig]:
    """Returns one configuration for each structure of a family."""
    structures = {_structure(config): config for config in shipped if config.decoder_block in families}
    yield from structures.values()
    for block, family in families.items():
        if block not in {config.decoder_block for config in structures.values()}:
            sizes: dict[str, Any] = dict.fromkeys((*_sizes(family.config_class), *family.required), 2)
            for experts in (1, 2):
                yield family.config_class(**{**sizes, "decoder_block": block, "num_experts": experts})


def _structure(config: ModelConfig) -> tuple[Any, ...]:
    """Returns what sets structures apart: switches, and the sizes that are set at all."""
    sizes = {name: bool(getattr(config, name)) for name in _sizes(type(config))}
    values = {**vars(config), "logits_via_embedding": None} | sizes
    return (*values.values(), config.num_experts > 1, config.num_kv_shared_layers)


def _sizes(of: type[ModelConfig]) -> set[str]:
    """Returns the fields of a configuration that are sizes, those that only this family has among them."""
    return {name for name, kind in typing.get_type_hints(of).items() if kind is int} - {*_SWITCHES}


def _match(family: type[BaseConverter], example: ModelConfig, state: param_tree.ParamTree, axis: int) -> Match | None:
    """Compares the state with one structure of a family; None if the family cannot read such a tree at all."""
    tied = "decoder/logits_dense/kernel" not in state.leaves
    try:
        return _compared(family, dataclasses.replace(example, param_scan_axis=axis, logits_via_embedding=tied), state)
    except PortaxError:
        return None


def _compared(family: type[BaseConverter], config: ModelConfig, state: param_tree.ParamTree) -> Match:
    """Solves for the sizes, from the names that the family's hooks have for the axes of each leaf."""
    converter = _counted(family, config, state)
    equations, odd = _equations(converter, state)
    sizes = _solve(equations, {name: getattr(converter.config, name) for name in _SWITCHES})
    solved = _solved(converter.config, sizes)
    untold = {field for name in equations for term in axes.parse(name).terms for field in term.unknown(sizes)}
    untold |= {name for name in sizes.keys() - vars(config) if solved is None or solved.size(name) != sizes[name]}
    odd += [f"{name} = {sorted(dims)}" for name, dims in equations.items() if len(dims) > 1]
    if solved is not None and not untold:
        odd += [f"{name} = {sorted(dims)}" for name, dims in equations.items() if {solved.size(name)} != dims]
        odd += _refused(family, solved)
    return Match(
        decoder_block=config.decoder_block,
        converter=family,
        sizes={name: size for name, size in sizes.items() if name not in _SWITCHES},
        untold=tuple(sorted(untold)),
        scan_axis=config.param_scan_axis,
        config=None if untold or odd else solved,
        usual=not odd and _usual(converter, state),
        odd=tuple(dict.fromkeys(odd)),
    )


def _counted(family: type[BaseConverter], config: ModelConfig, state: param_tree.ParamTree) -> BaseConverter:
    """Returns a converter of the family with the numbers of layers that the tree has."""
    layout, trial = Canonical(), _not_refusing(family)
    found = trial(config, layout=layout).groups(state)
    layers = [layer for group in found for layer in group.layers if not group.is_global]
    told: dict[str, Any] = {"num_decoder_layers": max(len(layers), 1)}
    told |= family.layer_counts(config, layers)
    return trial(dataclasses.replace(config, **told), layout=layout)


def _equations(converter: BaseConverter, state: param_tree.ParamTree) -> tuple[dict[str, set[int]], list[str]]:
    """Returns the sizes of each axis in the tree, by the hooks' name of it, and leaves that do not fit the hooks."""
    odd: list[str] = []
    equations: dict[str, set[int]] = {"num_decoder_layers": {converter.config.num_decoder_layers}}
    for group in converter.groups(state):
        read = _read(converter, group)
        odd += [group.names(path) for path in read.keys() ^ {*group.paths}]
        for path in read.keys() & {*group.paths}:
            dims = _without_scan(group, group.layers[0].leaves[path].shape, group.scan_axis(path))
            names = read[path].split()
            if len(names) != len(dims):
                odd.append(group.names(path))
            for name, dim in zip(names, dims, strict=False):
                equations.setdefault(name, set()).add(dim)
    return equations, odd


def _not_refusing(family: type[BaseConverter]) -> type[BaseConverter]:
    """Returns the family without its `check_config`, which may refuse sizes that are only an example's."""
    return type(family.__name__, (family,), {"check_config": lambda self: None})


def _refused(family: type[BaseConverter], config: ModelConfig) -> list[str]:
    """Returns the reason why the family refuses a model of the sizes that the leaves tell; none if it takes it."""
    try:
        family(config, layout=Canonical())
    except ConfigError as error:
        return [str(error)]
    return []


def _solved(config: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig | None:
    fields: dict[str, Any] = {name: size for name, size in sizes.items() if name in _sizes(type(config))}
    try:
        return dataclasses.replace(config, **fields)
    except ConfigError:  # what the leaves tell does not go with the example's for what they do not
        return None


def _read(converter: BaseConverter, group: LayerGroup) -> Mapping[str, str]:
    """Returns the leaves that the hooks read of one layer, with the names of their axes."""
    leaves = _Listening(group.paths, converter.config, types=group.types)
    hook = converter.global_weights if group.is_global else converter.layer_blocks
    jax.eval_shape(lambda: jax.tree.leaves(tuple(hook(leaves))))
    return leaves.axes


class _Listening(LayerParams):
    """Leaves that record how they are read, whatever their shapes."""

    def __init__(self, paths: Iterable[str], config: ModelConfig, *, types: frozenset[str]):
        super().__init__(dict.fromkeys(paths), config, types=types)
        self.axes: dict[str, str] = {}

    def read(self, path: str, axes: str, scale_shift: ScaleShift | None = None) -> Any:
        self.axes[path] = axes
        return super().read(path, axes, scale_shift)


def _without_scan(group: LayerGroup, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + len(group.scan) :]


def _solve(equations: Mapping[str, set[int]], known: Mapping[str, int]) -> dict[str, int]:
    """Solves for the sizes, given the values of axes: `{"2*head_dim": {256}}` determines `head_dim`."""
    known = dict(known)
    for _ in equations:
        for name, dims in equations.items():
            terms = axes.parse(name).terms
            open_terms = [term for term in terms if term.unknown(known)]
            if len(open_terms) != 1 or len(open_terms[0].unknown(known)) != 1:
                continue
            rest = min(dims) - sum(term.known_factor(known) for term in terms if term is not open_terms[0])
            factor = open_terms[0].known_factor(known)
            if rest > 0 and rest % factor == 0:
                known[open_terms[0].unknown(known)[0]] = rest // factor
    return known


def _usual(converter: BaseConverter, state: param_tree.ParamTree) -> bool:
    forms = (True, False) if converter.scan_pattern is not None else (False,)
    try:
        return any(converter.expected_tree(scanned=scanned).keys() == {*state.leaves} for scanned in forms)
    except PortaxError:  # the family has no tree without a checkpoint to look at
        return False

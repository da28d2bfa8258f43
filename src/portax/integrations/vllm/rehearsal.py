"""A rehearsal of a weight update: vLLM's own loaders, on tensors without memory, tell what an update would fill.

vLLM itself is silent about a leaf that never comes, and fills a part of a fused one with whatever memory holds.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.model_loader.reload import layerwise, meta, utils

from portax.errors import Problem
from portax.integrations.vllm.reload_state import place_back

Key: TypeAlias = tuple[str, str]
"""A module and the name of its parameter."""

MOST_PROBLEMS = 20  # a model of another size would refuse every tensor


@dataclasses.dataclass(frozen=True)
class Arriving:
    """A tensor that an update will bring.

    Attributes:
        name: The hub's name.
        dtype: Name of its dtype.
        shape: Its whole shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def on_meta(self) -> torch.Tensor:
        """Makes such a tensor without memory."""
        return torch.empty(tuple(self.shape), dtype=getattr(torch, self.dtype), device="meta")


@dataclasses.dataclass
class Rehearsal:
    """The parameters that an update would fill.

    Attributes:
        filled: Elements that would be written, by parameter.
        modules: The modules into which each arriving tensor goes.
        problems: Everything that would go wrong, or stay as it was.
    """

    filled: dict[Key, int] = dataclasses.field(default_factory=dict)
    modules: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)


@torch.no_grad()
def rehearse(model: torch.nn.Module, arriving: Sequence[Arriving]) -> Rehearsal:
    """Loads tensors without memory into a model that holds none for the time being, and counts.

    Args:
        model: A model of vLLM, between two steps. It is as before afterwards.
        arriving: All tensors of the update, in the order of sending.
    """
    found = Rehearsal(modules={each.name: set() for each in arriving})
    same = _shared_parameters(model)
    with _emptied(model) as parameters:
        _load(model, parameters, arriving, found)
        if len(found.problems) < MOST_PROBLEMS:
            found.problems += _unused(found)
            found.problems += _unfilled(parameters, same, found)
    return found


def _load(
    model: torch.nn.Module, parameters: Mapping[Key, torch.Tensor], arriving: Sequence[Arriving], found: Rehearsal
) -> None:
    """Loads all tensors; one that the model refuses is a problem, and the rest is tried without it."""
    current: list[Arriving] = []

    def feed(tensors: Sequence[Arriving]) -> Iterator[tuple[str, torch.Tensor]]:
        for each in tensors:
            current[:] = [each]
            yield each.name, each.on_meta()

    def note(key: Key, elements: int) -> None:
        name = current[0].name
        found.filled[key] = found.filled.get(key, 0) + elements
        found.modules[name].add(key[0])
        lossy = _lossy(current[0].dtype, parameters[key].dtype)
        if lossy and not any(problem.leaf == name for problem in found.problems):
            found.problems.append(_cast_problem(current[0], key, parameters[key]))

    with _counting(model, parameters, note):
        rest = list(arriving)
        while rest and len(found.problems) < MOST_PROBLEMS:
            try:
                model.load_weights(feed(rest))
                return
            except Exception as error:  # a loader may raise anything
                found.problems.append(_refused(current[0], error))
                rest = rest[rest.index(current[0]) + 1 :]


def _unused(found: Rehearsal) -> list[Problem]:
    known = {problem.leaf for problem in found.problems}
    return [
        Problem(
            name,
            "a tensor that the engine's loader passes over in silence",
            "a parameter of the engine that it fills",
            "the engine runs another model, or only a part of this one",
        )
        for name, modules in found.modules.items()
        if not modules and name not in known
    ]


def _unfilled(
    parameters: Mapping[Key, torch.Tensor], same: Mapping[Key, frozenset[Key]], found: Rehearsal
) -> list[Problem]:
    problems = []
    for key, parameter in parameters.items():
        size = utils.get_tensor_load_numel(parameter)
        filled = max(found.filled.get(each, 0) for each in same.get(key, {key}))
        if filled < size:
            problems.append(
                Problem(
                    ".".join(key),
                    f"{filled} of {size} elements in what the trainer sends",
                    "all of them; vLLM would keep old values, or fill in whatever memory holds, in silence",
                    "the engine's model has parts that the trainer's has not, or its config.json is another one",
                )
            )
    return problems


def _shared_parameters(model: torch.nn.Module) -> dict[Key, frozenset[Key]]:
    """Parameters that are one and the same object in several modules, such as tied embeddings."""
    holders: dict[int, set[Key]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add((path, name))
    return {key: frozenset(keys) for keys in holders.values() for key in keys}


@contextlib.contextmanager
def _emptied(model: torch.nn.Module) -> Iterator[dict[Key, torch.Tensor]]:
    """Gives every module the parameters that loaders expect, without memory; puts back what was there."""
    parameters: dict[Key, torch.Tensor] = {}
    emptied = []
    try:
        for path, module in model.named_modules():
            info = layerwise.get_layerwise_info(module)
            info.kernel_tensors = utils.get_layer_params_buffers(module)
            info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
            emptied.append(module)
            meta.restore_layer_on_meta(module, info)
            for name, leaf in module._parameters.items():
                if leaf is not None:  # vLLM leaves some, such as biases, where they are
                    module._parameters[name] = leaf if leaf.is_meta else meta.to_meta_tensor(leaf)
                    parameters[path, name] = module._parameters[name]
        yield parameters
    finally:
        for module in emptied:
            place_back(module)


@contextlib.contextmanager
def _counting(
    model: torch.nn.Module, parameters: Mapping[Key, torch.Tensor], note: Callable[[Key, int], None]
) -> Iterator[None]:
    """Lets every parameter's loader tell how many elements it writes."""
    loaders = {key: layerwise._get_weight_loader(leaf) for key, leaf in parameters.items()}
    try:
        for key, leaf in parameters.items():
            leaf.weight_loader = _counted(layerwise._get_original_loader(leaf), key, note)
        yield
    finally:
        for key, leaf in parameters.items():
            leaf.weight_loader = loaders[key]


def _counted(loader: Callable, key: Key, note: Callable[[Key, int], None]) -> Callable:
    @functools.wraps(loader)
    def load(*args: Any, **kwargs: Any) -> Any:
        with _Written() as written:
            result = loader(*args, **kwargs)
        note(key, written.elements)
        return result

    return load


class _Written(TorchDispatchMode):
    """Counts the elements that are copied or filled; padding is filled."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def _lossy(source: str, target: torch.dtype) -> bool:
    return torch.promote_types(getattr(torch, source), target) != target


def _cast_problem(tensor: Arriving, key: Key, parameter: torch.Tensor) -> Problem:
    wanted = str(parameter.dtype).removeprefix("torch.")
    return Problem(
        tensor.name,
        tensor.dtype,
        f"{wanted}, as the engine's {'.'.join(key)}; vLLM would round in silence",
        f"the converter keeps the trainer's dtype: layout=portax.layouts.HuggingFace(dtype={wanted!r})",
    )


def _refused(tensor: Arriving, error: Exception) -> Problem:
    text = " ".join(str(error).split())[:200]
    return Problem(
        tensor.name,
        f"{tensor.dtype}{list(tensor.shape)}, which the engine's loader refuses: {type(error).__name__}: {text}",
        "a tensor of the engine's model",
        "the engine runs another model, or one of another size",
    )

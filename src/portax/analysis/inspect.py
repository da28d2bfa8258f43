"""Inspects a checkpoint: its leaves, its model family, and the result of each layout."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from portax._text.names import fold, fold_key
from portax._text.report import Report
from portax._text.tables import new_table, plural, size, text_lines
from portax.analysis.identify import Match, identify
from portax.checkpoints.reading import Checkpoint
from portax.config.model_config import ModelConfig
from portax.converters import converter_for, families
from portax.errors import PlanError, PortaxError
from portax.layouts import Canonical, FlaxNnx, HuggingFace, Layout, TpuInference
from portax.trainer import param_tree

_ENGINE = "0.32"
_TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Inspection(Report):
    """The report of an inspection.

    Attributes:
        found: The findings, as values for JSON.
    """

    found: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, as values for JSON."""
        return dict(self.found)

    def __rich__(self) -> RenderableType:
        found = self.found
        scan = f"scanned on axis {found['scan_axis']}" if found["scanned"] else "unscanned"
        others = ", ".join(f"{name} ({plural(count, 'leaf', 'leaves')})" for name, count in found["others"].items())
        parameters = plural(found["leaves"], "leaf", "leaves")
        lines = {
            "checkpoint": f"{found['path']} ({found['form']})",
            "root": found["root"] or "none",
            "parameters": f"{parameters}, {size(found['bytes'])}, {', '.join(found['dtypes'])}",
            "layers": f"{found['layers'] or 'unknown'}, {scan}",
            "not read": others or "nothing",
        }
        text = [f"{name:<12}{value}" for name, value in lines.items()]
        text += [line for match in found["families"] for line in _family_lines(match)]
        return Group(tree_table(found["tree"]), text_lines(text), "", _layouts_table(found["layouts"]))


def inspect(checkpoint: Checkpoint, shipped: Mapping[str, ModelConfig], config: ModelConfig | None) -> Inspection:
    """Inspects a checkpoint, from its metadata alone.

    Args:
        checkpoint: The checkpoint.
        shipped: Configurations by name.
        config: The model's configuration; None to identify it from the leaves.
    """
    state = param_tree.read(checkpoint)
    matches = identify(checkpoint, families(), shipped.values())
    known = config or next((match.config for match in matches if match.config is not None), None)
    dtypes = collections.Counter(leaf.dtype.name for leaf in checkpoint.values())
    others = collections.Counter(path.partition("/")[0] for path in checkpoint.others)
    found = {
        "path": checkpoint.path,
        "form": checkpoint.form,
        "root": checkpoint.root + state.root,
        "leaves": len(checkpoint),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(dtypes),
        "others": dict(others),
        **_layers(matches, state.leaves),
        "families": [_match(match, shipped) for match in matches],
        "layouts": [
            _layout(name, layout, known, checkpoint) if known else {"layout": name, "problem": _unknown(matches)}
            for name, layout in _layouts().items()
        ],
        "tree": {
            path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "bytes": leaf.nbytes, "chunk": _chunk(leaf)}
            for path, leaf in checkpoint.items()
        },
    }
    return Inspection(found)


def _layers(matches: Sequence[Match], leaves: Mapping[str, Any]) -> dict[str, Any]:
    containers = {path.split("/")[1] for path in leaves if path.startswith("decoder/")}
    scanned = bool(containers & {"layers", "scanned_blocks"})
    depth = matches[0].sizes.get("num_decoder_layers") if matches else None
    return {"layers": depth, "scanned": scanned, "scan_axis": matches[0].scan_axis if matches and scanned else None}


def _match(match: Match, shipped: Mapping[str, ModelConfig]) -> dict[str, Any]:
    return {
        "decoder_block": match.decoder_block,
        "converter": match.converter.__name__,
        "fits": not match.odd,
        "usual_form": match.usual,
        "sizes": dict(match.sizes),
        "not_told": list(match.untold),
        "same_sizes_as": [
            name
            for name, config in shipped.items()
            if config.decoder_block == match.decoder_block
            and all(config.size(field) == size for field, size in match.sizes.items())
        ],
        "odd_leaves": list(match.odd),
    }


def _layouts() -> dict[str, Layout]:
    torchax = {f"tpu-inference {_ENGINE}, tp={tp}": TpuInference(version=_ENGINE, tp=tp) for tp in _TENSOR_PARALLEL}
    native = {f"flax-nnx {_ENGINE}, tp={tp}": FlaxNnx(version=_ENGINE, tp=tp) for tp in _TENSOR_PARALLEL}
    return {"hf": HuggingFace(), "canonical": Canonical(), **torchax, **native}


def _unknown(matches: Sequence[Match]) -> str:
    """Returns the reason why no layout can be planned."""
    fits = next((match for match in matches if not match.odd), None)
    if fits is None:
        return "no family fits these leaves"
    return f"{', '.join(_untold(fits.untold, fits.sizes))}: not told by the leaves; pass --model or --config"


def _untold(names: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
    """Names the sizes that the leaves do not determine, or only as a product."""
    return [f"the factors of {name}={sizes[name]}" if name in sizes else name for name in names]


def _layout(name: str, layout: Layout, config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        plan = converter_for(config, layout=layout).plan(checkpoint)
    except PlanError as error:
        first = error.problems[0]
        return {
            "layout": name,
            "problem": f"{plural(len(error.problems), 'problem')}, such as {first.leaf}: found {first.found}",
        }
    except PortaxError as error:
        return {"layout": name, "problem": str(error)}
    return {
        "layout": name,
        "tensors": len(plan.entries),
        "bytes": plan.bytes_out,
        "working_bytes": plan.working_bytes,
        "casts": {cast: len(names) for cast, names in plan.casts.items()},
    }


def _chunk(leaf: Any) -> list[int] | None:
    chunk = getattr(leaf, "chunk", None)
    return None if chunk is None else list(chunk)


def _family_lines(match: Mapping[str, Any]) -> Iterator[str]:
    name = f"{match['decoder_block']} ({match['converter']})"
    if not match["fits"]:
        odd = match["odd_leaves"]
        leaves = plural(len(odd), "odd leaf", "odd leaves")
        yield f"{'family':<12}none fits; the nearest is {name}: {leaves}, such as {', '.join(odd[:3])}"
        return
    yield f"{'family':<12}{name}{'' if match['usual_form'] else ', in a form of another MaxText version'}"
    yield f"{'sizes':<12}{', '.join(f'{field}={value}' for field, value in match['sizes'].items())}"
    if match["same_sizes_as"]:
        yield f"{'':<12}as {', '.join(match['same_sizes_as'])}"
    if match["not_told"]:
        untold = ", ".join(_untold(match["not_told"], match["sizes"]))
        yield f"{'not told':<12}{untold}: pass --model or --config for what layouts need"


def tree_table(tree: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Returns a table of the leaves of a checkpoint, folded.

    Args:
        tree: `shape`, `dtype`, `chunk` and `bytes` of each leaf by its path.
    """
    table = new_table("leaf family", ("count", "right"), "shape", "dtype", "chunk", ("bytes", "right"))
    groups: dict[Any, list[str]] = {}
    for path, leaf in tree.items():
        groups.setdefault((fold_key(path), str(leaf["shape"]), leaf["dtype"], str(leaf["chunk"] or "")), []).append(
            path
        )
    for (_, shape, dtype, chunk), paths in groups.items():
        nbytes = size(sum(tree[path]["bytes"] for path in paths))
        table.add_row("\n".join(fold(paths)), str(len(paths)), shape, dtype, chunk, nbytes)
    return table


def _layouts_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not rows:
        return ""
    table = new_table("layout", ("tensors", "right"), ("bytes", "right"), ("layers in work", "right"), "casts")
    for row in rows:
        if "problem" in row:
            table.add_row(row["layout"], "", "", "", row["problem"])
        else:
            casts = ", ".join(f"{cast}: {count}" for cast, count in row["casts"].items())
            table.add_row(row["layout"], str(row["tensors"]), size(row["bytes"]), size(row["working_bytes"]), casts)
    return table

"""Golden files: digests of the leaves of a real engine, and trees with known values."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from portax.errors import GoldenError, QuantizationError
from portax.layouts import FlaxNnx, HuggingFace, Layout, MaxTextVllm, Quantization, TpuInference
from portax.testing.probe import probe
from portax.testing.spread import edges, spread

PROBE = "probe"
VALUES = {PROBE: probe, "spread": spread, "edges": edges}
"""Functions that fill the parameters of a golden's tree, by the name in its file."""

SOURCE_DTYPES = ("float32", "bfloat16")
_HUB_VALUES = re.compile(r"hf\.(\w+)\.json$")
_ENGINES: Mapping[str | None, type[Layout]] = {None: TpuInference, "flax_nnx": FlaxNnx}


@dataclasses.dataclass(frozen=True)
class Tree:
    """A trainer's tree as dumped: its configuration, and the shape and dtype of every parameter.

    Attributes:
        config: MaxText config attributes.
        shapes: Shape and dtype by full path.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, jax.ShapeDtypeStruct]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tree":
        """Reads a `source.json`.

        Raises:
            GoldenError: The file is not one.
        """
        content = _load(path, "config", "params")
        try:
            shapes = {
                name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
                for name, leaf in content["params"].items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise GoldenError(f"{path}: params is not a mapping of path to shape and dtype ({error!r})") from error
        return cls(content["config"], shapes)

    def fill(self, values: str = PROBE, dtype: Any = None) -> dict[str, np.ndarray]:
        """Returns known values for every parameter, in host memory.

        Args:
            values: One of `VALUES`, as the golden says.
            dtype: Dtype of all of them; None for their own. Probe values are exact in bfloat16.

        Raises:
            GoldenError: There are no values of that name.
        """
        if values not in VALUES:
            raise GoldenError(f"values {values!r} are not known; known: {', '.join(VALUES)}")
        make = VALUES[values]
        return {
            path: make(path, leaf.shape).astype(leaf.dtype if dtype is None else jnp.dtype(dtype))
            for path, leaf in self.shapes.items()
        }


@dataclasses.dataclass(frozen=True)
class GoldenLeaf:
    """One leaf of the engine.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype.
        spec: Its partitioning; None if the file does not say.
        digest: First 16 hex digits of the sha256 of its bytes, in C order.
        digest_bf16: The same of its values in bfloat16; None if the file does not say.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec | None
    digest: str
    digest_bf16: str | None = None


@dataclasses.dataclass(frozen=True)
class Golden:
    """The result of a real engine, or of MaxText's own exporter, for a known tree.

    Attributes:
        layout: The layout that must reproduce it.
        leaves: The trainer-owned leaves.
        engine_owned: Names of the leaves that the engine fills itself.
        values: Name of the tree's values, for `Tree.fill`.
    """

    layout: Layout
    leaves: Mapping[str, GoldenLeaf]
    engine_owned: tuple[str, ...]
    values: str = PROBE

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Golden":
        """Reads an engine's golden (`tpu-inference-*.json`, `maxtext-vllm-*.json`) or a hub export's (`hf.json`).

        Raises:
            GoldenError: The file is neither, or of an engine that no layout reproduces.
        """
        content = _load(path)
        try:
            if "tensors" in content:
                leaves = {name: _leaf(leaf) for name, leaf in content["tensors"].items()}
                named = _HUB_VALUES.search(os.fspath(path))
                return cls(HuggingFace(), leaves, (), named[1] if named else PROBE)
            trainer = {name: _leaf(leaf) for name, leaf in content["leaves"].items() if leaf["owner"] == "trainer"}
            engine = tuple(name for name in content["leaves"] if name not in trainer)
            return cls(_engine_layout(content), trainer, engine, content.get("values", PROBE))
        except (AttributeError, KeyError, TypeError) as error:
            raise GoldenError(f"{path}: is not a golden file: {error!r}") from error
        except GoldenError as error:
            raise GoldenError(f"{path}: {error}") from error

    def of_source(self, dtype: str) -> "Golden":
        """Returns the golden for the same tree in another dtype; the hub's tensors keep the trainer's.

        Raises:
            GoldenError: The file does not say.
        """
        if dtype == "float32":
            return self
        if not isinstance(self.layout, HuggingFace):
            if self.values != PROBE:
                raise GoldenError(f"it tells what is made of float32: {self.values} values are not exact in {dtype}")
            return self
        if any(leaf.digest_bf16 is None for leaf in self.leaves.values()):
            raise GoldenError("it has no digests of its tensors in bfloat16")
        leaves = {
            name: dataclasses.replace(leaf, dtype=dtype, digest=str(leaf.digest_bf16))
            for name, leaf in self.leaves.items()
        }
        return dataclasses.replace(self, leaves=leaves)


def is_golden(path: pathlib.Path) -> bool:
    """Tells whether a `.json` should be treated as a golden: it has leaves or tensors, or cannot be read at all."""
    try:
        content = _load(path)
    except GoldenError:
        return True
    return "leaves" in content or "tensors" in content


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of one leaf with its golden.

    Attributes:
        name: The leaf.
        nbytes: Its size.
        difference: The differences, in words; empty if it is exact.
    """

    name: str
    nbytes: int
    difference: str


def compare(weights: Mapping[str, Any], golden: Golden) -> list[Comparison]:
    """Compares every leaf with the golden, both ways: keys, shapes, dtypes, specs, bytes."""
    rows = [_compare_leaf(name, weights.get(name), leaf) for name, leaf in golden.leaves.items()]
    rows += [
        Comparison(name, leaf.nbytes, "the engine has no such leaf")
        for name, leaf in weights.items()
        if name not in golden.leaves
    ]
    return rows


def digest(leaf: Any) -> str:
    """Returns the first 16 hex digits of the sha256 of an array's bytes, in C order, unsharded."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(leaf)).tobytes()).hexdigest()[:16]


def _compare_leaf(name: str, leaf: Any, expected: GoldenLeaf) -> Comparison:
    if leaf is None:
        return Comparison(name, 0, "missing")
    spec = leaf.sharding.spec if isinstance(getattr(leaf, "sharding", None), NamedSharding) else None
    pairs: dict[str, tuple[Any, Any]] = {
        "shape": (tuple(leaf.shape), expected.shape),
        "dtype": (np.dtype(leaf.dtype).name, expected.dtype),
    }
    if spec is not None and expected.spec is not None:
        pairs["spec"] = (spec, expected.spec)
    pairs["sha256"] = (digest(leaf), expected.digest)
    wrong = [f"{what} {got}, not {want}" for what, (got, want) in pairs.items() if got != want]
    return Comparison(name, leaf.nbytes, "; ".join(wrong))


def _engine_layout(content: Mapping[str, Any]) -> Layout:
    if content.get("implementation") == "MaxTextForCausalLM":
        return _maxtext_layout(content)
    kind = _ENGINES.get(content.get("implementation"))
    if kind is None:
        raise GoldenError(f"no layout reproduces an engine that runs {content['implementation']}")
    attention_dp = content["mesh"].get("attn_dp")
    options: dict[str, Any] = {
        "version": content["versions"]["tpu-inference"],
        "tp": content["mesh"]["model"] * (attention_dp or 1),
        "moe_backend": (content["moe_backend"] or "gmm_tp").lower(),
    }
    if kind is TpuInference and (cache := content.get("kv_cache_dtype")) is not None:
        options |= {"kv_cache_dtype": cache, "kv_scale_form": "xla_cpu"}
    if (quantization := _quantization(content)) is not None:
        options["quantization"] = quantization
    return kind(**options) if kind is FlaxNnx else TpuInference(**options, attention_dp=attention_dp)


def _quantization(content: Mapping[str, Any]) -> Quantization | None:
    """The settings of an engine on simulated devices; a native JAX model does not read those of bfloat16 linears."""
    if "setting" not in content:
        return None
    native = content.get("implementation") == "flax_nnx"
    try:
        environment = {name: value for name, value in content["env"].items() if not (native and "BF16_LINEAR_" in name)}
        if unknown := {*environment} - {*Quantization.variables()}:
            raise QuantizationError(f"{', '.join(sorted(unknown))} is no setting that is known")
        found = Quantization.of_environment(environment, checkpoint=content["checkpoint"], scale_form="xla_cpu")
        refuses = content.get("values") != "edges"  # of these it is known what the engine makes
        return found and dataclasses.replace(found, refuses_values=refuses)
    except (KeyError, QuantizationError) as error:
        raise GoldenError(f"no layout reproduces weights quantised as {content['setting']}: {error}") from error


def _maxtext_layout(content: Mapping[str, Any]) -> MaxTextVllm:
    mesh = content["mesh"]
    return MaxTextVllm(
        version=content["versions"]["maxtext"],
        tp=mesh["model"] * mesh["attn_dp"],
        attention_dp=mesh["attn_dp"],
        expert_parallel=mesh["expert"] * mesh["attn_dp_expert"],
        prefused=not any(name.endswith(".wi_0") for name in content["leaves"]),
    )


def _leaf(row: Mapping[str, Any]) -> GoldenLeaf:
    spec = None
    if "spec" in row:
        spec = PartitionSpec(*(tuple(axis) if isinstance(axis, list) else axis for axis in row["spec"]))
    return GoldenLeaf(tuple(row["shape"]), row["dtype"], spec, row["sha256"], row.get("sha256_bf16"))


def _load(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not {*keys} <= {*content}:
        raise GoldenError(f"{path}: is not a mapping with {', '.join(keys)}")
    return content

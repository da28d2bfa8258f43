"""`ModelConfig`: what a converter must know of a model, from whatever the caller has."""

import dataclasses
import enum
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from portax.errors import ConfigError

_ABSENT = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and switches of one model, under MaxText's names (without the `base_` prefix).

    Attributes:
        decoder_block: MaxText's name of the decoder, e.g. `qwen3` or `qwen3_moe`.
        num_decoder_layers: Layers.
        emb_dim: Width of the residual stream.
        num_query_heads: Query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: Width of one head.
        vocab_size: Rows of the embedding.
        mlp_dim: Width of the dense MLP.
        num_experts: Routed experts per layer; 1 means a dense MLP.
        moe_mlp_dim: Width of one routed expert.
        logits_via_embedding: Whether the output projection is the embedding table (tied embeddings).
        param_scan_axis: Axis on which MaxText stacks scanned layers.
        rollout_tensor_parallelism: Tensor parallelism of the rollout engine, where the trainer's config states it.
    """

    decoder_block: str
    num_decoder_layers: int
    emb_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_dim: int = 0
    num_experts: int = 1
    moe_mlp_dim: int = 0
    logits_via_embedding: bool = False
    param_scan_axis: int = 1
    rollout_tensor_parallelism: int | None = None

    def __post_init__(self):
        if problems := _violations(vars(self)):
            raise ConfigError(_message(problems))

    @classmethod
    def of(cls, source: Any) -> "ModelConfig":
        """Reads a configuration from any of the forms it comes in.

        Args:
            source: A `ModelConfig`; a MaxText config object; a mapping in MaxText's keys or in those of a hub
                `config.json`; or the path of a MaxText model YAML or of a hub `config.json`.

        Returns:
            The configuration.

        Raises:
            ConfigError: Fields are missing, of the wrong kind, or contradict each other; the message names all.
        """
        if isinstance(source, ModelConfig):
            return source
        if isinstance(source, str | os.PathLike):
            source = _load(pathlib.Path(source))
        if isinstance(source, Mapping):
            if "model_type" in source:
                return cls._build(_from_hub(source))
            return cls._build(_from_maxtext(lambda name: source.get(name, _ABSENT)))
        return cls._build(_from_maxtext(lambda name: _attribute(source, name)))

    @classmethod
    def _build(cls, found: "_Found") -> "ModelConfig":
        if problems := [*found.problems, *_violations(found.values)]:
            raise ConfigError(_message(problems))
        return cls(**found.values)

    def size(self, axis: str) -> int:
        """The size of one axis of a weight: a field's name, a number, or a product of them (`2*head_dim`)."""
        return math.prod(int(f) if f.isdecimal() else getattr(self, f) for f in axis.split("*"))


@dataclasses.dataclass(frozen=True)
class _Found:
    values: dict[str, Any]
    problems: list[str]


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_REQUIRED = tuple(name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING)
_BASED = ("num_decoder_layers", "emb_dim", "num_query_heads", "num_kv_heads", "mlp_dim", "moe_mlp_dim")  # base_* keys
_UNSET = (None, -1)  # how MaxText spells "not set"
_MAY_BE_UNSET = ("num_experts", "moe_mlp_dim", "rollout_tensor_parallelism")


def _from_maxtext(get: Callable[[str], Any]) -> _Found:
    values: dict[str, Any] = {}
    problems: list[str] = []
    scaled = get("global_parameter_scale") not in (_ABSENT, None, 1)
    for name in _FIELDS:
        value, base = get(name), get(f"base_{name}") if name in _BASED else _ABSENT
        if scaled and value is _ABSENT and base is not _ABSENT:
            problems.append(f"{name}: global_parameter_scale is set, so base_{name} is not the size; give {name} too")
        if not scaled and _ABSENT not in (value, base) and value != base:
            problems.append(f"{name}: {value!r} contradicts base_{name}: {base!r}")
        value = base if value is _ABSENT else value
        if value is _ABSENT or (name in _MAY_BE_UNSET and value in _UNSET):
            if name in _REQUIRED:
                problems.append(f"{name}: missing (MaxText's key is {'base_' * (name in _BASED)}{name})")
            continue
        values[name] = value.value if isinstance(value, enum.Enum) else value
    return _Found(values, problems)


_HUB_KEYS = {
    "num_decoder_layers": "num_hidden_layers",
    "emb_dim": "hidden_size",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
_HUB_MOE_KEYS = {"num_experts": "num_experts", "moe_mlp_dim": "moe_intermediate_size"}
_HUB_MODELS = {"qwen3": ("qwen3", _HUB_KEYS), "qwen3_moe": ("qwen3_moe", _HUB_KEYS | _HUB_MOE_KEYS)}


def _from_hub(source: Mapping[str, Any]) -> _Found:
    if source["model_type"] not in _HUB_MODELS:
        known = ", ".join(sorted(_HUB_MODELS))
        raise ConfigError(_message([f"model_type: {source['model_type']!r} is not known; known: {known}"]))
    decoder_block, keys = _HUB_MODELS[source["model_type"]]
    problems = [f"{key}: missing from the hub config" for key in keys.values() if key not in source]
    if source.get("mlp_only_layers") or source.get("decoder_sparse_step", 1) != 1:
        problems.append("mlp_only_layers, decoder_sparse_step: MaxText has no model that mixes dense and MoE layers so")
    values = {name: source[key] for name, key in keys.items() if key in source}
    values |= {"decoder_block": decoder_block, "logits_via_embedding": source.get("tie_word_embeddings", False)}
    return _Found(values, problems)


def _violations(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in values.items():
        kind = _FIELDS[name].type
        if kind in (bool, str):
            if not isinstance(value, kind):
                problems.append(f"{name}: {value!r} is not a {kind.__name__}")
        elif (name, value) != ("rollout_tensor_parallelism", None):
            least = 0 if name in ("mlp_dim", "moe_mlp_dim", "param_scan_axis") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name}: {value!r} is not an integer of at least {least}")
    if problems:
        return problems
    experts = values.get("num_experts", 1)
    width = "moe_mlp_dim" if experts > 1 else "mlp_dim"
    if not values.get(width):
        problems.append(f"{width}: missing, with num_experts={experts} (MaxText's key is base_{width})")
    if values.get("param_scan_axis", 1) not in (0, 1):
        problems.append(f"param_scan_axis: {values['param_scan_axis']} is neither 0 nor 1")
    return problems


def _message(problems: list[str]) -> str:
    return "not a usable model configuration:\n" + "\n".join(f"  {problem}" for problem in problems)


def _attribute(source: Any, name: str) -> Any:
    try:
        return getattr(source, name)
    except (AttributeError, KeyError, ValueError):  # MaxText's own objects raise ValueError for unknown names
        return _ABSENT


def _load(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix in (".yml", ".yaml"):
            import yaml

            content = yaml.safe_load(text)
        else:
            raise ConfigError(f"{path}: a model configuration is a .yml, .yaml or .json file")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a mapping of configuration keys")
    return content

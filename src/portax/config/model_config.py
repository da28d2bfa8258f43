"""`ModelConfig`: what a converter must know of a model, from whatever the caller has."""

import dataclasses
import enum
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from portax.config import hub
from portax.errors import ConfigError

_ABSENT = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and switches of one model, under MaxText's names (without the `base_` prefix).

    Attributes:
        decoder_block: MaxText's name of the decoder, e.g. `qwen3_moe` or `gemma4`.
        num_decoder_layers: Layers.
        emb_dim: Width of the residual stream.
        num_query_heads: Query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: Width of one head.
        vocab_size: Rows of the embedding.
        mlp_dim: Width of the dense MLP.
        num_experts: Routed experts per layer; 1 means a dense MLP.
        moe_mlp_dim: Width of one routed expert.
        shared_experts: Experts that every token goes through, beside the routed ones.
        logits_via_embedding: Whether the output projection is the embedding table (tied embeddings).
        attention_bias: Whether the query, key and value projections have biases.
        rope_type: `llama3.1` where a head's rotary pairs are interleaved.
        inhomogeneous_layer_cycle_interval: Layers after which the kinds of layer repeat; 1 where the config does not
            tell, as MaxText's Gemma configs do not.
        global_head_dim: Width of one head in global-attention layers; 0 if it is `head_dim`.
        global_num_kv_heads: KV heads of global-attention layers; 0 if they are `num_kv_heads`.
        share_kv_projections: Whether global-attention layers use their keys as values.
        num_kv_shared_layers: How many of the last layers use the keys and values of earlier ones.
        use_double_wide_mlp: Whether the layers without keys and values of their own have an MLP of twice the width.
        hidden_size_per_layer_input: Width of the per-layer embeddings; 0 without them.
        vocab_size_per_layer_input: Rows of the per-layer embeddings.
        gdn_num_key_heads: Key heads of a gated delta net.
        gdn_num_value_heads: Value heads of a gated delta net; a multiple of the key heads.
        gdn_key_head_dim: Width of one of its key heads.
        gdn_value_head_dim: Width of one of its value heads.
        gdn_conv_kernel_dim: Taps of its convolution.
        use_multimodal: Whether the trainer has encoders of other modalities, which are not converted.
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
    shared_experts: int = 0
    logits_via_embedding: bool = False
    attention_bias: bool = False
    rope_type: str = "default"
    inhomogeneous_layer_cycle_interval: int = 1
    global_head_dim: int = 0
    global_num_kv_heads: int = 0
    share_kv_projections: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    gdn_num_key_heads: int = 0
    gdn_num_value_heads: int = 0
    gdn_key_head_dim: int = 0
    gdn_value_head_dim: int = 0
    gdn_conv_kernel_dim: int = 0
    use_multimodal: bool = False
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
                return cls._build(*hub.fields(source))
            return cls._build(*_from_maxtext(lambda name: source.get(name, _ABSENT)))
        return cls._build(*_from_maxtext(lambda name: _attribute(source, name)))

    @classmethod
    def _build(cls, values: dict[str, Any], problems: list[str]) -> "ModelConfig":
        if problems := [*problems, *_violations(values)]:
            raise ConfigError(_message(problems))
        return cls(**values)

    def size(self, axis: str) -> int:
        """The size of one axis of a weight: fields, numbers, their products and sums (`2*head_dim`)."""
        return sum(self._product(term) for term in axis.split("+"))

    def _product(self, term: str) -> int:
        return math.prod(int(f) if f.isdecimal() else getattr(self, f) for f in term.split("*"))

    @property
    def gdn_key_dim(self) -> int:
        """Width of all key heads of a gated delta net."""
        return self.gdn_num_key_heads * self.gdn_key_head_dim

    @property
    def gdn_value_dim(self) -> int:
        """Width of all value heads of a gated delta net."""
        return self.gdn_num_value_heads * self.gdn_value_head_dim


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_REQUIRED = tuple(name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING)
_BASED = ("num_decoder_layers", "emb_dim", "num_query_heads", "num_kv_heads", "mlp_dim", "moe_mlp_dim")  # base_* keys
_UNSET = (None, -1)  # how MaxText spells "not set"


def _from_maxtext(get: Callable[[str], Any]) -> tuple[dict[str, Any], list[str]]:
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
        if value is _ABSENT or (name not in _REQUIRED and value in _UNSET):
            if name in _REQUIRED:
                problems.append(f"{name}: missing (MaxText's key is {'base_' * (name in _BASED)}{name})")
            continue
        values[name] = value.value if isinstance(value, enum.Enum) else value
    return values, problems


def _violations(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in values.items():
        kind = _FIELDS[name].type
        if kind in (bool, str):
            if not isinstance(value, kind):
                problems.append(f"{name}: {value!r} is not a {kind.__name__}")
        elif (name, value) != ("rollout_tensor_parallelism", None):
            least = 0 if name == "param_scan_axis" or _FIELDS[name].default == 0 else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name}: {value!r} is not an integer of at least {least}")
    if problems:
        return problems
    experts = values.get("num_experts", 1)
    width = "moe_mlp_dim" if experts > 1 else "mlp_dim"
    if not values.get(width):
        problems.append(f"{width}: missing, with num_experts={experts} (MaxText's key is base_{width})")
    if values.get("use_multimodal"):
        problems.append("use_multimodal: the weights of other modalities are not converted; export the decoder alone")
    keys, heads = values.get("gdn_num_key_heads"), values.get("gdn_num_value_heads")
    if keys and heads and heads % keys:
        problems.append(f"gdn_num_value_heads: {heads} is no multiple of gdn_num_key_heads: {keys}")
    if values.get("param_scan_axis", 1) not in (0, 1):
        problems.append(f"param_scan_axis: {values['param_scan_axis']} is neither 0 nor 1")
    return problems


def _message(problems: list[str]) -> str:
    return "not a usable model configuration:\n" + "\n".join(f"  {problem}" for problem in problems)


def reader(source: Any) -> Callable[[str], Any]:
    """What reads a trainer's configuration by MaxText's keys, also those that a `ModelConfig` has not; None if absent.

    Args:
        source: A MaxText config object, a mapping, or the path of a YAML or JSON.

    Raises:
        ConfigError: The file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        source = _load(pathlib.Path(source))
    if isinstance(source, Mapping):
        return source.get

    def get(name: str) -> Any:
        value = _attribute(source, name)
        return None if value is _ABSENT else getattr(value, "value", value)

    return get


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

"""`ModelConfig`: the sizes and switches of a model, read from whatever configuration the caller has."""

import dataclasses
import enum
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from portax.config import axes
from portax.errors import ConfigError

_Config = TypeVar("_Config", bound="ModelConfig")
_ABSENT = object()

ConfigSource: TypeAlias = object
"""A configuration in any form: `ModelConfig`, MaxText config object, mapping, or path of a YAML or JSON file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and switches of one model, under MaxText's names (without the `base_` prefix).

    A model family that needs more of MaxText's fields derives a frozen dataclass of its own, with those fields and
    their defaults, and names it as its `config_class`.

    Attributes:
        decoder_block: MaxText's name of the decoder, e.g. `qwen3_moe` or `gemma4`.
        num_decoder_layers: Number of layers.
        emb_dim: Width of the residual stream.
        num_query_heads: Query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: Width of one head.
        vocab_size: Rows of the embedding.
        mlp_dim: Width of the dense MLP.
        num_experts: Routed experts per layer; 1 means a dense MLP.
        moe_mlp_dim: Width of one routed expert.
        padded_base_moe_mlp_dim: Width to which the trainer pads routed experts with zeros; 0 without.
        shared_experts: Experts that every token goes through, beside the routed ones.
        routed_bias: True if routers have a bias.
        logits_via_embedding: True if the output projection is the embedding table (tied embeddings).
        attention_bias: True if the query, key and value projections have biases.
        rope_type: Kind of rotary frequencies; of a Llama also the order of a head's rotary pairs, which `llama3.1`
            keeps interleaved. Empty where the config leaves that open.
        inhomogeneous_layer_cycle_interval: Layers after which the kinds of layer repeat; 1 where the config does not
            tell, as MaxText's Gemma configs do not.
        global_head_dim: Width of one head in global-attention layers; 0 if it is `head_dim`.
        global_num_kv_heads: KV heads of global-attention layers; 0 if they are `num_kv_heads`.
        share_kv_projections: True if global-attention layers use their keys as values.
        num_kv_shared_layers: Number of layers, at the end, that use the keys and values of earlier ones.
        use_double_wide_mlp: True if layers without keys and values of their own have an MLP of twice the width.
        hidden_size_per_layer_input: Width of the per-layer embeddings; 0 without them.
        vocab_size_per_layer_input: Rows of the per-layer embeddings.
        gdn_num_key_heads: Key heads of a gated delta net.
        gdn_num_value_heads: Value heads of a gated delta net; a multiple of the key heads.
        gdn_key_head_dim: Width of one of its key heads.
        gdn_value_head_dim: Width of one of its value heads.
        gdn_conv_kernel_dim: Taps of its convolution.
        use_multimodal: True if the trainer has encoders of other modalities, which are not converted.
        param_scan_axis: Axis on which MaxText stacks scanned layers.
        rollout_tensor_parallelism: Tensor parallelism of the rollout engine, where the trainer's config states it.

    Example:
        >>> portax.ModelConfig.of(config).size("num_kv_heads*head_dim")
        32
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
    padded_base_moe_mlp_dim: int = 0
    shared_experts: int = 0
    routed_bias: bool = False
    logits_via_embedding: bool = False
    attention_bias: bool = False
    rope_type: str = ""
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
        if problems := _violations(type(self), vars(self)):
            raise ConfigError(_message(problems))

    @classmethod
    def of(cls: type[_Config], source: ConfigSource) -> _Config:
        """Reads a trainer's configuration from any of the forms it comes in.

        Args:
            source: A `ModelConfig`; a MaxText config object; a mapping in MaxText's keys; or the path of a MaxText
                model YAML. For a hub `config.json` use `portax.read_config`.

        Returns:
            The configuration.

        Raises:
            ConfigError: Fields are missing, of the wrong kind, or contradict each other; the message names all.

        Example:
            >>> from portax.config.shipped import config_path
            >>> portax.ModelConfig.of(config_path("qwen3-8b")).emb_dim
            4096
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, ModelConfig):
            return cls._of_another(source)
        source = load(source)
        if isinstance(source, Mapping):
            if "model_type" in source:
                raise ConfigError(
                    f"model_type={source['model_type']!r}: this is the hub's config.json, which the converter of its "
                    "model family reads: use portax.read_config"
                )
            return cls.build(*_from_maxtext(cls, lambda name: source.get(name, _ABSENT)))
        return cls.build(*_from_maxtext(cls, lambda name: _attribute(source, name)))

    @classmethod
    def _of_another(cls: type[_Config], config: "ModelConfig") -> _Config:
        own = _fields(cls).keys() - _fields(type(config)).keys()
        if own:
            raise ConfigError(
                f"a {type(config).__name__} does not have {', '.join(sorted(own))}, which {cls.__name__} has: pass the "
                "trainer's configuration itself, or read it with portax.read_config"
            )
        return cls(**{name: getattr(config, name) for name in _fields(cls)})

    @classmethod
    def build(cls: type[_Config], values: Mapping[str, Any], problems: Iterable[str] = ()) -> _Config:
        """Makes a configuration of its fields.

        Raises:
            ConfigError: There are problems already, or the values are not usable; names all.
        """
        if problems := [*problems, *_violations(cls, values)]:
            raise ConfigError(_message(problems))
        return cls(**values)

    def size(self, axis: str) -> int:
        """Returns the size of one axis of a weight: fields, numbers, their products and sums (`2*head_dim`)."""
        return axes.parse(axis).size(lambda name: getattr(self, name))

    @property
    def gdn_key_dim(self) -> int:
        """Total width of the key heads of a gated delta net."""
        return self.gdn_num_key_heads * self.gdn_key_head_dim

    @property
    def gdn_value_dim(self) -> int:
        """Total width of the value heads of a gated delta net."""
        return self.gdn_num_value_heads * self.gdn_value_head_dim


@dataclasses.dataclass(frozen=True)
class _Field:
    kind: Any
    required: bool
    least: int


def _fields(of: type[ModelConfig]) -> Mapping[str, _Field]:
    """The fields of a class, in order. Its annotations may be text, as in a plug-in with postponed ones."""
    kinds = typing.get_type_hints(of)
    return {field.name: _field(field, kinds[field.name]) for field in dataclasses.fields(of)}


def _field(field: dataclasses.Field, kind: Any) -> _Field:
    may_be_zero = field.name == "param_scan_axis" or field.default == 0
    return _Field(kind, field.default is dataclasses.MISSING, 0 if may_be_zero else 1)


_ROTATED_BY_NAME = ("llama3.1", "llama3.3")
"""Names under which MaxText 0.2.5 does not go by the default `rope_type`, which its config then has all the same: it
rotates (layers/attentions.py) or imports (checkpoint_conversion) them as `llama3.1`. No result depends on a name: the
config is taken to leave open what it does not say."""

_BASED = ("num_decoder_layers", "emb_dim", "num_query_heads", "num_kv_heads", "mlp_dim", "moe_mlp_dim")  # base_* keys


def _from_maxtext(of: type[ModelConfig], get: Callable[[str], Any]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    scaled = get("global_parameter_scale") not in (_ABSENT, None, 1)
    for name, field in _fields(of).items():
        value, base = get(name), get(f"base_{name}") if name in _BASED else _ABSENT
        if scaled and value is _ABSENT and base is not _ABSENT:
            problems.append(f"{name}: global_parameter_scale is set, so base_{name} is not the size; give {name} too")
        if not scaled and _ABSENT not in (value, base) and value != base:
            problems.append(f"{name}: {value!r} contradicts base_{name}: {base!r}")
        value = base if value is _ABSENT else value
        if value is _ABSENT or (not field.required and _is_unset(value)):
            if field.required:
                problems.append(f"{name}: missing (MaxText's key is {'base_' * (name in _BASED)}{name})")
            continue
        values[name] = value.value if isinstance(value, enum.Enum) else value
    if values.get("rope_type") == "default" and str(get("model_name")).startswith(_ROTATED_BY_NAME):
        del values["rope_type"]
    return values, problems


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value == -1)  # how MaxText spells "not set"


def _violations(of: type[ModelConfig], values: Mapping[str, Any]) -> list[str]:
    fields = _fields(of)
    problems = [problem for name, value in values.items() if (problem := _violation(name, fields[name], value))]
    if problems:
        return problems
    experts = values.get("num_experts", 1)
    width = "moe_mlp_dim" if experts > 1 else "mlp_dim"
    if not values.get(width):
        problems.append(f"{width}: missing, with num_experts={experts} (MaxText's key is base_{width})")
    padded = values.get("padded_base_moe_mlp_dim") or 0
    if 0 < padded < values.get("moe_mlp_dim", 0):
        problems.append(f"padded_base_moe_mlp_dim: {padded} is less than moe_mlp_dim: {values['moe_mlp_dim']}")
    if values.get("use_multimodal"):
        problems.append("use_multimodal: the weights of other modalities are not converted; export the decoder alone")
    keys, heads = values.get("gdn_num_key_heads"), values.get("gdn_num_value_heads")
    if keys and heads and heads % keys:
        problems.append(f"gdn_num_value_heads: {heads} is no multiple of gdn_num_key_heads: {keys}")
    if values.get("param_scan_axis", 1) not in (0, 1):
        problems.append(f"param_scan_axis: {values['param_scan_axis']} is neither 0 nor 1")
    return problems


def _violation(name: str, field: _Field, value: Any) -> str | None:
    """Says what is wrong with one value; fields of other kinds, which only plug-ins have, are theirs to check."""
    if value is None and type(None) in typing.get_args(field.kind):
        return None
    if field.kind in (bool, str):
        return None if isinstance(value, field.kind) else f"{name}: {value!r} is not a {field.kind.__name__}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if field.kind in (int, int | None) and not (whole and value >= field.least):
        return f"{name}: {value!r} is not an integer of at least {field.least}"
    if field.kind is float and not (whole or isinstance(value, float)):
        return f"{name}: {value!r} is not a number"
    return None


def _message(problems: list[str]) -> str:
    return "not a usable model configuration:\n" + "\n".join(f"  {problem}" for problem in problems)


def reader(source: ConfigSource) -> Callable[[str], Any]:
    """Returns a function that reads a trainer's configuration by MaxText's keys, also keys that `ModelConfig` lacks.

    The function returns None for a key that is absent.

    Args:
        source: A MaxText config object, a mapping, or the path of a YAML or JSON.

    Raises:
        ConfigError: The file cannot be read.
    """
    source = load(source)
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


def load(source: ConfigSource) -> Any:
    """Reads a configuration file, given its path; returns anything else as it is.

    Args:
        source: The path of a `.yml`, `.yaml` or `.json` file, or any other form of a configuration.

    Raises:
        ConfigError: The file cannot be read, or holds no mapping.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    path = pathlib.Path(source)
    parse = {".json": _parse_json, ".yml": _parse_yaml, ".yaml": _parse_yaml}.get(path.suffix)
    if parse is None:
        raise ConfigError(f"{path}: a model configuration is a .yml, .yaml or .json file")
    try:
        content = parse(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply to be a configuration") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a mapping of configuration keys")
    return content


def _parse_json(text: str) -> Any:
    return json.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error

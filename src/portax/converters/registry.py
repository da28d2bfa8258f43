"""The registry of model families: portax's own and those that other packages register."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from portax.config.hub import HubConfig, is_hub_config
from portax.config.model_config import ConfigSource, ModelConfig, load, reader
from portax.config.to_hub import TrainerConfig
from portax.converters.base import BaseConverter
from portax.converters.deepseek import DeepSeekConverter
from portax.converters.gemma2 import Gemma2Converter
from portax.converters.gemma3 import Gemma3Converter
from portax.converters.gemma4 import Gemma4Converter
from portax.converters.gemma4_small import Gemma4SmallConverter
from portax.converters.gpt_oss import GptOssConverter
from portax.converters.llama import LlamaConverter
from portax.converters.maxtext import MaxTextConverter
from portax.converters.mistral import MistralConverter
from portax.converters.mixtral import MixtralConverter
from portax.converters.olmo3 import Olmo3Converter
from portax.converters.qwen2 import Qwen2Converter
from portax.converters.qwen3 import Qwen3Converter
from portax.converters.qwen3_5 import Qwen3_5Converter
from portax.converters.qwen3_next import Qwen3NextConverter
from portax.errors import ConfigError
from portax.layouts import Layout

ENTRY_POINTS = "portax.converters"

_OWN: tuple[type[BaseConverter], ...] = (
    Qwen2Converter,
    Qwen3Converter,
    Qwen3NextConverter,
    Qwen3_5Converter,
    LlamaConverter,
    MistralConverter,
    MixtralConverter,
    Olmo3Converter,
    Gemma2Converter,
    Gemma3Converter,
    Gemma4Converter,
    Gemma4SmallConverter,
    GptOssConverter,
    DeepSeekConverter,
)


def converter_for(
    config: ConfigSource,
    *,
    layout: Layout | None = None,
    mesh: Mesh | None = None,
    module_prefix: str | None = None,
    strict_dtype: bool = False,
    leave: Sequence[str] = (),
) -> BaseConverter:
    """Returns the converter for a model, chosen by its config (`decoder_block`), never by the model's name.

    For an engine that runs MaxText's own model, a decoder that no family covers is converted by structure alone, and
    so is one of which the config lacks what its family needs.

    Args:
        config: Anything that `read_config` reads: a MaxText config object, a mapping, a YAML or `config.json` path.
        layout: The engine's layout of weights; None reads it off `config.rollout_tensor_parallelism` and the installed
            tpu-inference.
        mesh: The mesh that results go to, partitioned by the layout; None leaves them where they were computed.
        module_prefix: The module around the language model in the engine's class; None for the family's usual one.
        strict_dtype: True makes a cast that loses precision an error.
        leave: Patterns of `fnmatch` for whole paths of leaves to leave out, because the engine has no place for them.

    Returns:
        The converter.

    Raises:
        ConfigError: The configuration is incomplete or of an unknown family.
        LayoutError: There is no layout, or the mesh does not fit it.

    Example:
        >>> layout = portax.layouts.TpuInference(version="0.32", tp=4)
        >>> portax.converter_for(portax.config.shipped.config_path("qwen3-8b"), layout=layout).architecture
        'Qwen3ForCausalLM'
    """
    config = read_config(config)
    options: dict[str, Any] = {"layout": layout, "module_prefix": module_prefix, "strict_dtype": strict_dtype}
    options["leave"] = leave
    if isinstance(layout, Layout) and layout.names == "trainer" and not _says_enough(config):
        return MaxTextConverter(config, mesh, **options)
    return _family(config.decoder_block)(config, mesh, **options)


def _says_enough(config: ModelConfig) -> bool:
    """Tells whether a family covers the model, and its fields are set."""
    family = families().get(config.decoder_block)
    return family is not None and all(getattr(config, name, None) for name in family.required)


def read_config(source: ConfigSource) -> ModelConfig:
    """Reads a model's configuration, whichever family it is of.

    Args:
        source: A `ModelConfig`; a MaxText config object; a mapping in MaxText's keys or in those of a hub
            `config.json`; or the path of a MaxText model YAML or of a hub `config.json`.

    Returns:
        The configuration, of the family's own class where it has one.

    Raises:
        ConfigError: Fields are missing, of the wrong kind, or contradict each other; or the hub's family is unknown.

    Example:
        >>> portax.read_config({"model_type": "qwen3", "num_hidden_layers": 2})
        Traceback (most recent call last):
        portax.errors.ConfigError: not a usable model configuration:
          hidden_size: missing from the hub config
          ...
    """
    source = load(source)
    if is_hub_config(source):
        return _reader_of(HubConfig(source)).read_config(source)
    family = families().get(_decoder_block(source), None)
    return ModelConfig.of(source) if family is None else family.read_config(source)


def derive_hub_config(source: ConfigSource) -> dict[str, Any]:
    """Returns the hub's `config.json` of a model, from its trainer's configuration.

    Nothing on which results depend is guessed or takes a default: the configuration says it, or the family leaves no
    choice. Fields that are no property of the weights (token ids, the longest context) keep the loader's defaults.

    Args:
        source: MaxText's config object, a mapping, or the path of a YAML or JSON, in MaxText's keys.

    Returns:
        The content of a `config.json`, such as `export` takes as `hub_config`.

    Raises:
        ConfigError: The configuration does not say enough, or has something that the family's class on the hub lacks;
            or the family has no derivation.

    Example:
        >>> portax.derive_hub_config(portax.config.shipped.config_path("qwen3-8b"))["rope_theta"]
        1000000
    """
    source = load(source)
    config = read_config(source)
    trainer = TrainerConfig(source, config)
    return trainer.finish(_family(config.decoder_block).to_hub(trainer))


def _decoder_block(source: ConfigSource) -> str:
    block = reader(source)("decoder_block")
    return getattr(block, "value", block)


def _family(decoder_block: str) -> type[BaseConverter]:
    known = families()
    if decoder_block not in known:
        listed = ", ".join(f"{block} ({family.__name__})" for block, family in known.items())
        raise ConfigError(
            f"decoder_block={decoder_block!r} has no converter; known: {listed}. "
            f"A package can register one under the entry point group {ENTRY_POINTS!r}"
        )
    return known[decoder_block]


def _reader_of(hub: HubConfig) -> type[BaseConverter]:
    """The family of a hub `config.json`; `hub_types` that a family inherits are not its own."""
    known = [family for family in dict.fromkeys(families().values()) if "hub_types" in vars(family)]
    found = [family for family in known if family.reads_hub(hub)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"model_type={hub.model_type!r} is that of several families, {', '.join(map(_origin, found))}: use the "
            "class itself, or the trainer's configuration, whose decoder_block tells"
        )
    listed = ", ".join(sorted({name for family in known for name in family.hub_types}))
    raise ConfigError(
        f"not a usable model configuration:\n  model_type: {hub.model_type!r} is not known; known: {listed}. "
        f"A package can register a family under the entry point group {ENTRY_POINTS!r}"
    )


def families() -> dict[str, type[BaseConverter]]:
    """Returns every known converter by the `decoder_block` that it is for.

    Raises:
        ConfigError: A registered converter cannot be loaded or is none, or two are for the same `decoder_block`.
    """
    known: dict[str, type[BaseConverter]] = {}
    for family in (*_OWN, *_registered()):
        for block in family.decoder_blocks:
            if block in known and known[block] is not family:
                raise ConfigError(
                    f"decoder_block={block!r} has two converters, {_origin(known[block])} and {_origin(family)}: "
                    "uninstall one of the packages, or use the class itself"
                )
            known[block] = family
    return known


def _registered() -> list[type[BaseConverter]]:
    return [_load(entry) for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)]


def _load(entry: importlib.metadata.EntryPoint) -> type[BaseConverter]:
    where = f"entry point {entry.name} = {entry.value}" + (f" of {entry.dist.name}" if entry.dist else "")
    try:
        family = entry.load()
    except Exception as error:
        raise ConfigError(f"{where}: cannot be loaded ({error!r})") from error
    if not (isinstance(family, type) and issubclass(family, BaseConverter) and family.decoder_blocks):
        raise ConfigError(f"{where}: is no subclass of portax.BaseConverter that names its decoder_blocks")
    return family


def _origin(family: type[BaseConverter]) -> str:
    return f"{family.__module__}.{family.__qualname__}"

"""Arguments of several commands: the weights, the model, the layout."""

import argparse
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from portax import layouts
from portax.analysis import html_page
from portax.checkpoints import config_json
from portax.checkpoints.atomic_dir import refuse_existing
from portax.cli import quantization
from portax.config.model_config import ModelConfig
from portax.config.shipped import config_path
from portax.converters import converter_for, read_config
from portax.converters.base import BaseConverter
from portax.errors import ConfigError
from portax.execution import byte_counts
from portax.layouts._tpu import TpuEngine
from portax.layouts.quantization import SCALE_FORMS
from portax.testing import demo

DTYPES = ("bfloat16", "float16", "float32")
_LAYOUTS: dict[str, type[layouts.Layout]] = {
    "tpu-inference": layouts.TpuInference,
    "flax-nnx": layouts.FlaxNnx,
    "maxtext-vllm": layouts.MaxTextVllm,
    "canonical": layouts.Canonical,
    "hf": layouts.HuggingFace,
    "huggingface": layouts.HuggingFace,
}


def add_weights(parser: argparse.ArgumentParser, *, filled: bool = False) -> None:
    """Adds the weights: a checkpoint or a tree.

    Args:
        parser: The parser to extend.
        filled: True accepts a dumped tree, which has no values of its own.
    """
    text = (
        "an Orbax checkpoint (a folder or URL: its tree, its step, or a run with one step), or a trainer's tree as "
        ".safetensors by path"
    )
    text += "; or a dumped tree's .json, which is filled with probe values" if filled else ""
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=text)
    parser.add_argument("--tree", metavar="FILE", help="the same, as an option")


def add_model(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Adds the model's configuration.

    Args:
        parser: The parser to extend.
        default: Help text for the default.
    """
    end = f" (default: {default})" if default else ""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="NAME", help="a model whose configuration is shipped, e.g. qwen3-30b-a3b")
    which.add_argument("--config", metavar="FILE", help=f"MaxText model YAML or JSON, or a hub config.json{end}")


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Adds the layout."""
    parser.add_argument("--layout", choices=_LAYOUTS, default="tpu-inference", help="how the engine holds weights")
    text = "version of tpu-inference, or of MaxText for maxtext-vllm; default: the installed one"
    parser.add_argument("--engine-version", metavar="X.Y", help=text)
    text = "take an engine newer than the known layouts to hold weights as the newest of them does"
    parser.add_argument("--allow-untested", action="store_true", help=text)
    parser.add_argument("--tp", type=int, help="tensor-parallel size; required by every engine")
    parser.add_argument("--moe-backend", choices=("gmm_tp", "gmm_ep", "fused_moe"), default="gmm_tp")
    text = "attention data-parallel size of an engine with NEW_MODEL_DESIGN=1"
    parser.add_argument("--attention-dp", type=int, metavar="K", help=text)
    text = "the engine's KV cache dtype, where it has latent attention (DeepSeek): fp8"
    parser.add_argument("--kv-cache-dtype", metavar="DTYPE", help=text)
    text = "rounding of latent attention's scales by the engine's compiler"
    parser.add_argument("--kv-scale-form", choices=SCALE_FORMS, help=text)
    text = "of maxtext-vllm: expert_parallelism of the engine's sharding strategy"
    parser.add_argument("--expert-parallel", type=int, metavar="K", help=text)
    text = "of maxtext-vllm: the engine is started with prefuse_moe_weights=False"
    parser.add_argument("--not-prefused", action="store_true", help=text)
    text = "of maxtext-vllm: how gate and up are fused (default: per_shard)"
    parser.add_argument("--experts", choices=("per_shard", "whole", "as_loaded"), help=text)
    parser.add_argument("--dtype", choices=DTYPES, help="default: the layout's own")
    quantization.add(parser)
    parser.add_argument("--strict-dtype", action="store_true", help="make a cast that loses precision an error")
    text = "leave out the trainer's leaves whose whole path it matches, such as '*/vision_encoder/*'; may be repeated"
    parser.add_argument("--leave", action="append", default=[], metavar="PATTERN", help=text)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds the engine whose goldens are shipped."""
    text = "whose goldens: tpu-inference's own models, or MaxText's in vLLM (default: %(default)s)"
    parser.add_argument("--engine", choices=demo.ENGINES, default="tpu-inference", help=text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the folder that a command writes."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--dry-run", action="store_true", help="plan, check, show; write nothing")


def new_folder(args: argparse.Namespace) -> pathlib.Path:
    """Returns the folder that a command writes.

    Raises:
        CheckpointError: Something of this name exists.
    """
    out = pathlib.Path(args.out)
    refuse_existing(out)
    return out


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Adds compiling for devices that are not here."""
    text = "also compile every program of a sync for simulated devices: memory, bytes between devices, time at best"
    parser.add_argument("--compile", action="store_true", help=text)
    parser.add_argument("--devices", type=int, metavar="N", help="devices of trainer and engines (default: the mesh's)")
    text = (
        "the trainer's mesh, e.g. fsdp=64,tensor=4; of its axes fsdp, tensor and expert cut weights (default: fsdp=N)"
    )
    parser.add_argument("--trainer-mesh", metavar="AXIS=SIZE,...", help=text)


def meshes(args: argparse.Namespace, layout: layouts.Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the sizes of the axes of the trainer's mesh, and of the engines' on the same devices.

    Raises:
        ConfigError: They are not given, or of different sizes, or the layout is for no engine's mesh.
    """
    if args.devices is None and args.trainer_mesh is None:
        raise ConfigError("--compile needs --devices, or --trainer-mesh")
    trainer = {"fsdp": args.devices} if args.trainer_mesh is None else _mesh(args.trainer_mesh)
    count, shards = math.prod(trainer.values()), math.prod(layout.mesh_axes.values())
    if args.devices not in (None, count):
        raise ConfigError(f"--trainer-mesh {args.trainer_mesh} has {count} devices, and --devices says {args.devices}")
    if not layout.mesh_axes:
        raise ConfigError(f"--compile is for engines that spread weights over a mesh, and {layout} does not")
    if count % shards:
        raise ConfigError(f"{count} devices are no multiple of the {shards} of one engine")
    return trainer, {"data": count // shards, **layout.mesh_axes}


def _mesh(text: str) -> dict[str, int]:
    parts = [part.partition("=") for part in text.split(",")]
    if any(not axis or not size.isdecimal() or int(size) < 1 for axis, _, size in parts):
        raise ConfigError(f"--trainer-mesh {text} is not of the form fsdp=64,tensor=4")
    return {axis: int(size) for axis, _, size in parts}


def byte_count(text: str) -> int:
    """Parses an option that is a number of bytes."""
    try:
        return byte_counts.parse_byte_count("bytes", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("bytes=")) from error


def add_page(parser: argparse.ArgumentParser) -> None:
    """Adds the page that shows the result."""
    text = "also write a page that shows it, in one HTML file; replaces a page of portax, and no other file"
    parser.add_argument("--html", metavar="FILE", help=text)


def page(args: argparse.Namespace) -> pathlib.Path | None:
    """Returns the path of the page to write; None without `--html`.

    Raises:
        ReportError: Another file has this name.
    """
    return None if args.html is None else html_page.refuse_other(args.html)


def named_config(args: argparse.Namespace) -> str | pathlib.Path | None:
    """Returns the file of the named configuration; None if none is named.

    Raises:
        ConfigError: No configuration of that name is shipped.
    """
    return args.config or (config_path(args.model) if args.model else None)


def hub_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the content of the named hub `config.json`: of --hub-config, or of --config, which may also be MaxText's.

    Raises:
        ConfigError: The file cannot be read, or is none.
    """
    if args.hub_config is not None:
        return config_json.read(args.hub_config)
    if args.config is None or not config_json.is_hub_config(args.config):
        return None
    return config_json.read(args.config)


def layout(args: argparse.Namespace) -> layouts.Layout:
    """Returns the layout that the options describe.

    Raises:
        ConfigError: An engine without a tensor-parallel size, or an option that is not for it.
        LayoutError: Its version or size is unknown, or it was not run quantised in this way.
    """
    options: dict[str, Any] = {} if args.dtype is None else {"dtype": jnp.dtype(args.dtype)}
    kind = _LAYOUTS[args.layout]
    options |= quantization.options(args, kind)
    named = _of_maxtext(args)
    if kind is not layouts.MaxTextVllm and named:
        option = next(iter(named)).replace("_", "-").replace("prefused", "not-prefused")
        raise ConfigError(f"--{option} is for --layout maxtext-vllm, not for --layout {args.layout}")
    if not issubclass(kind, TpuEngine | layouts.MaxTextVllm):
        return kind(**options)
    if args.tp is None:
        raise ConfigError("--tp is required: a tensor-parallel size is never assumed")
    if issubclass(kind, layouts.MaxTextVllm):
        options |= {"tp": args.tp, "allow_untested": args.allow_untested, **named}
        options |= {} if args.attention_dp is None else {"attention_dp": args.attention_dp}
        return (
            kind.installed(**options) if args.engine_version is None else kind(version=args.engine_version, **options)
        )
    options |= {"tp": args.tp, "moe_backend": args.moe_backend, "allow_untested": args.allow_untested}
    torchax = _of_torchax(args)
    if kind is not layouts.TpuInference and torchax:
        option = next(iter(torchax)).replace("_", "-")
        raise ConfigError(f"--{option} is for --layout tpu-inference, not for --layout {args.layout}")
    options |= torchax
    if args.engine_version is None:
        return kind.installed(**options)
    return kind(version=args.engine_version, **options)


def _of_torchax(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the given options that are only for an engine whose model runs on torchax."""
    names = ("attention_dp", "kv_cache_dtype", "kv_scale_form")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _of_maxtext(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the given options that are only for an engine with MaxText's own model."""
    named: dict[str, Any] = {} if args.expert_parallel is None else {"expert_parallel": args.expert_parallel}
    named |= {"prefused": False} if args.not_prefused else {}
    return named | ({} if args.experts is None else {"experts": args.experts})


def converter(args: argparse.Namespace, config: ModelConfig, layout: layouts.Layout) -> BaseConverter:
    """Returns the converter for a model and a layout, with the given options.

    Raises:
        ConfigError: The configuration is of an unknown family.
    """
    return converter_for(config, layout=layout, strict_dtype=args.strict_dtype, leave=args.leave)


def weights_and_config(
    args: argparse.Namespace, opened: Callable[..., tuple[Any, Any]], *, required: bool = True
) -> tuple[Mapping[str, Any] | None, ModelConfig]:
    """Returns the weights, if any are named, and the configuration.

    Args:
        args: The parsed command.
        opened: Opens the weights: one of `inputs`.
        required: True if there must be weights.

    Raises:
        ConfigError: There is no configuration, or it is not usable; or no weights where there must be.
        CheckpointError: The weights cannot be read.
    """
    if args.checkpoint and args.tree:
        raise ConfigError("CHECKPOINT and --tree are the same thing: name one")
    named = args.checkpoint or args.tree
    if named is None and required:
        raise ConfigError("no weights: name a checkpoint or a tree")
    params, carried = opened(named, scratch=getattr(args, "scratch", None)) if named else (None, None)
    config = named_config(args) or carried
    if config is None:
        raise ConfigError("no configuration: pass --model or --config; these weights do not carry one")
    return params, read_config(config)

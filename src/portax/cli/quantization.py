"""Options that choose how an engine, or a checkpoint of the hub, is quantised; nothing is read off the environment."""

import argparse
from typing import Any

from portax import layouts
from portax.errors import ConfigError
from portax.layouts.quantization import BFLOAT16, SCALE_FORMS, Quantization
from portax.weights.recipes import RECIPES


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    text = (
        "quantise: of an engine, the recipe of the checkpoint that it loads, or bf16 where it quantises online; of "
        "--layout hf, the recipe of the checkpoint to write"
    )
    parser.add_argument("--quantization", choices=(BFLOAT16, *RECIPES), help=text)
    text = "whether scales are rounded to bfloat16 on the engine's devices; required where an engine is quantised"
    parser.add_argument("--scale-form", choices=SCALE_FORMS, help=text)
    text = "a setting of a quantised engine, such as BF16_LINEAR_REQUANTIZE_PATTERNS=re:.*; may be repeated"
    parser.add_argument("--quantization-setting", action="append", default=[], metavar="NAME=VALUE", help=text)


def options(args: argparse.Namespace, kind: type[layouts.Layout]) -> dict[str, Any]:
    """Returns the options as the layout takes them; none without `--quantization`.

    Args:
        args: The parsed command.
        kind: The class of the layout.

    Raises:
        ConfigError: An option is missing, or is not for this layout or this recipe.
        QuantizationError: The settings do not go together.
    """
    if args.quantization is None:
        if args.scale_form is not None or args.quantization_setting:
            raise ConfigError("--scale-form and --quantization-setting go with --quantization")
        return {}
    if issubclass(kind, layouts.HuggingFace):
        return {"quantization": _recipe(args)}
    if not issubclass(kind, layouts.TpuInference | layouts.FlaxNnx):
        raise ConfigError(f"--quantization is not for --layout {args.layout}")
    if args.scale_form is None:
        raise ConfigError("--quantization needs --scale-form: what a compiler makes of scales is never assumed")
    told = _settings(args.quantization_setting)
    found = Quantization.of_environment(told, checkpoint=args.quantization, scale_form=args.scale_form)
    if found is None:
        raise ConfigError(
            f"--quantization {BFLOAT16} without settings quantises nothing: pass --quantization-setting "
            "BF16_LINEAR_REQUANTIZE_PATTERNS=... or MOE_REQUANTIZE_WEIGHT_DTYPE=..."
        )
    return {"quantization": found}


def _recipe(args: argparse.Namespace) -> str:
    if args.quantization == BFLOAT16:
        raise ConfigError(f"--quantization {BFLOAT16}: --layout {args.layout} takes a recipe: {', '.join(RECIPES)}")
    if args.scale_form is not None or args.quantization_setting:
        raise ConfigError(f"--scale-form and --quantization-setting are for engines, not for --layout {args.layout}")
    return args.quantization


def _settings(given: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in Quantization.variables() or not value:
            known = ", ".join(Quantization.variables())
            raise ConfigError(f"--quantization-setting {text}: is no NAME=VALUE with one of these names: {known}")
        if name in settings:
            raise ConfigError(f"--quantization-setting {name} is given twice")
        settings[name] = value
    return settings

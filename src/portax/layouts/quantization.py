"""`Quantization`: an engine's settings of quantisation, under the engine's own names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from portax.errors import QuantizationError
from portax.weights.quantize import DTYPES
from portax.weights.recipes import RECIPES, TILE

BFLOAT16 = "bf16"
SCALE_FORMS = ("narrow", "wide", "xla_cpu")
_WIDE_FROM = 4096  # scales
_FP8 = "float8_e4m3fn"
_DTYPES = ("bf16_linear_requantize_weight_dtype", "requantize_weight_dtype", "moe_requantize_weight_dtype")
_BLOCKS = ("bf16_linear_requantize_block_size", "requantize_block_size", "moe_requantize_block_size")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The settings of an engine that quantises, each under the name of the environment variable that sets it.

    They define what is exact. With `checkpoint="bf16"` a target is *as if the engine had loaded the bfloat16 checkpoint
    and quantised online*; with a recipe, *as if it had loaded the checkpoint that this recipe makes*. The two differ in
    bits, and so do the recipes. The value that is quantised is always the weight's cast to bfloat16.

    Attributes:
        checkpoint: `bf16`, or the recipe of the checkpoint: `fp8-block` (DeepGEMM's, as vLLM carries it),
            `fp8-block-hf` (transformers'), `ct-fp8` or `ct-int8` (compressed-tensors, per channel).
        scale_form: The compiler's treatment of rounding scales to bfloat16: `narrow`, they are rounded; `wide`, they
            are not; `xla_cpu`, as XLA on CPU does it, which drops the rounding where one computation makes 4096
            scales or more. What a TPU does has not been seen: compare with what the engine loaded itself.
        bf16_linear_requantize_patterns: The linears of a bf16 checkpoint that are quantised: module names, or regular
            expressions after `re:`.
        bf16_linear_requantize_weight_dtype: The dtype that these are quantised to.
        bf16_linear_requantize_block_size: Inputs that share a scale; None for all.
        requantize_weight_dtype: The dtype that linears of a block checkpoint are quantised to again.
        requantize_block_size: Inputs that share a scale; None for all.
        enable_quantized_matmul_kernel: Goes with `requantize_block_size`.
        moe_requantize_weight_dtype: The dtype that experts are quantised to; None for float8_e4m3fn if the checkpoint
            is quantised, and for bfloat16 if it is not.
        moe_requantize_block_size: Inputs that share a scale; None for all.
        moe_requantize_clip_percentile: Percentile of an expert's magnitudes that its weights are clipped to.
        disable_weight_requantization: True holds weights of a block checkpoint as they came.
        refuses_values: True makes a conversion and a sync raise for values that cannot be quantised, naming leaf and
            channels: NaN, infinity, and channels whose scale would be denormal, which the engine takes for zeros.
            False holds them as the engine does, as far as it repeats itself.

    Raises:
        QuantizationError: A value is unknown, or the settings do not go together, or were not run together.

    Example:
        >>> settings = portax.layouts.Quantization(
        ...     checkpoint="bf16", scale_form="narrow", bf16_linear_requantize_patterns=("re:.*",)
        ... )
        >>> settings.linear_dtype
        'float8_e4m3fn'
    """

    checkpoint: str
    scale_form: str
    bf16_linear_requantize_patterns: tuple[str, ...] = ()
    bf16_linear_requantize_weight_dtype: str = _FP8
    bf16_linear_requantize_block_size: int | None = None
    requantize_weight_dtype: str = _FP8
    requantize_block_size: int | None = None
    enable_quantized_matmul_kernel: bool = False
    moe_requantize_weight_dtype: str | None = None
    moe_requantize_block_size: int | None = None
    moe_requantize_clip_percentile: float | None = None
    disable_weight_requantization: bool = False
    refuses_values: bool = True

    def __post_init__(self):
        object.__setattr__(self, "bf16_linear_requantize_patterns", tuple(self.bf16_linear_requantize_patterns))
        self._check_values()
        self._check_combination()

    @classmethod
    def of_environment(
        cls, environment: Mapping[str, str], *, checkpoint: str, scale_form: str
    ) -> "Quantization | None":
        """Reads the settings that an engine was started with.

        Args:
            environment: Variables by name, such as `{"REQUANTIZE_WEIGHT_DTYPE": "int8"}`; others are not read.
            checkpoint: As the attribute.
            scale_form: As the attribute.

        Returns:
            The settings; None where nothing is quantised.

        Raises:
            QuantizationError: As the class.
        """
        given: dict[str, Any] = {
            name: _parsed(name, environment[variable])
            for variable, name in cls.variables().items()
            if environment.get(variable)
        }
        found = cls(checkpoint=checkpoint, scale_form=scale_form, **given)
        return found if found.is_of_quantised_checkpoint or found.patterns or found.experts_dtype else None

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Returns the attribute that each environment variable of an engine sets."""
        return {
            field.name.upper(): field.name
            for field in dataclasses.fields(cls)
            if field.name not in ("checkpoint", "scale_form", "refuses_values")
        }

    @property
    def is_of_quantised_checkpoint(self) -> bool:
        """True if a recipe made the checkpoint."""
        return self.checkpoint != BFLOAT16

    @property
    def patterns(self) -> tuple[str, ...]:
        """`bf16_linear_requantize_patterns`."""
        return self.bf16_linear_requantize_patterns

    @property
    def experts_dtype(self) -> str | None:
        """The dtype that experts are quantised to; None if they are not."""
        return self.moe_requantize_weight_dtype or (_FP8 if self.is_of_quantised_checkpoint else None)

    @property
    def linear_dtype(self) -> str:
        """The dtype that linears are quantised to."""
        return self.requantize_weight_dtype if self.is_of_quantised_checkpoint else self._online_dtype

    @property
    def linear_block(self) -> tuple[str, int | None]:
        """The variable that sets the number of inputs of a linear that share a scale, and its value."""
        name = "requantize_block_size" if self.is_of_quantised_checkpoint else "bf16_linear_requantize_block_size"
        return name.upper(), getattr(self, name)

    @property
    def _online_dtype(self) -> str:
        return self.bf16_linear_requantize_weight_dtype

    @property
    def holds_checkpoint_bits(self) -> bool:
        """True if linears have the bits of the checkpoint."""
        return self.disable_weight_requantization or self.checkpoint.startswith("ct-")

    @property
    def definition(self) -> str:
        """Words for what an exact result is."""
        if not self.is_of_quantised_checkpoint:
            return "as if the engine had loaded the bfloat16 checkpoint and quantised online"
        return (
            f"as if the engine had loaded the checkpoint that recipe {self.checkpoint} makes "
            f"({RECIPES[self.checkpoint].description})"
        )

    def is_wide(self, scales: int) -> bool:
        """Tells whether scales of bfloat16 weights stay unrounded.

        Args:
            scales: Number of scales that the engine makes in one computation.
        """
        return is_wide(self.scale_form, scales)

    def _check_values(self) -> None:
        if self.checkpoint != BFLOAT16 and self.checkpoint not in RECIPES:
            known = ", ".join((BFLOAT16, *RECIPES))
            raise QuantizationError(f"checkpoint={self.checkpoint!r} is no known recipe; known: {known}")
        if self.scale_form not in SCALE_FORMS:
            known = ", ".join(SCALE_FORMS)
            raise QuantizationError(f"scale_form={self.scale_form!r} is unknown; known: {known}")
        for name in _DTYPES:
            if (dtype := getattr(self, name)) is not None and dtype not in DTYPES:
                raise QuantizationError(
                    f"{name.upper()}={dtype} is no dtype that was run; those are {', '.join(DTYPES)}"
                )
        for name in _BLOCKS:
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise QuantizationError(f"{name.upper()}={size!r} is not a positive integer")
        percentile = self.moe_requantize_clip_percentile
        if percentile is not None and not 0 < percentile <= 100:
            raise QuantizationError(f"MOE_REQUANTIZE_CLIP_PERCENTILE={percentile} is not between 0 and 100")

    def _check_combination(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        names = {name for name in self.variables().values() if getattr(self, name) != defaults[name]}
        if bool(self.requantize_block_size) != self.enable_quantized_matmul_kernel:
            raise QuantizationError(
                "REQUANTIZE_BLOCK_SIZE and ENABLE_QUANTIZED_MATMUL_KERNEL=1 go together: the engine refuses each alone"
            )
        if idle := sorted(names - _MEANT_FOR[self._kind]):
            raise QuantizationError(
                f"{', '.join(name.upper() for name in idle)}: not run with checkpoint={self.checkpoint!r}; unset what "
                "the engine does not read there"
            )
        if "disable_weight_requantization" in names and len(names) > 1:
            rest = sorted(name.upper() for name in names - {"disable_weight_requantization"})
            raise QuantizationError(f"DISABLE_WEIGHT_REQUANTIZATION=1 was not run together with {', '.join(rest)}")
        if not (self.is_of_quantised_checkpoint or self.experts_dtype) and self.moe_requantize_block_size:
            raise QuantizationError("MOE_REQUANTIZE_BLOCK_SIZE does nothing without MOE_REQUANTIZE_WEIGHT_DTYPE")

    @property
    def _kind(self) -> str:
        return "bf16" if not self.is_of_quantised_checkpoint else "tiled" if RECIPES[self.checkpoint].tiled else "ct"


_MOE = frozenset({"moe_requantize_weight_dtype", "moe_requantize_block_size"})
_MEANT_FOR = {
    "bf16": _MOE
    | {
        "bf16_linear_requantize_patterns",
        "bf16_linear_requantize_weight_dtype",
        "bf16_linear_requantize_block_size",
    },
    "tiled": _MOE
    | {
        "requantize_weight_dtype",
        "requantize_block_size",
        "enable_quantized_matmul_kernel",
        "moe_requantize_clip_percentile",
        "disable_weight_requantization",
    },
    "ct": frozenset(),
}


def must_be_whole_tiles(name: str, **sizes: int) -> None:
    """Raises a `QuantizationError` unless tiles of 128 x 128 divide every size."""
    for what, size in sizes.items():
        if size % TILE:
            raise QuantizationError(
                f"{name}: {what} = {size} is no multiple of {TILE}: the engine's loader stops at such a part of a "
                "block checkpoint, or was not run with it"
            )


def _parsed(name: str, text: str) -> object:
    try:
        if name in _BLOCKS:
            return int(text)
        if name == "moe_requantize_clip_percentile":
            return float(text)
    except ValueError:
        raise QuantizationError(f"{name.upper()}={text!r} is not a number") from None
    if name in ("enable_quantized_matmul_kernel", "disable_weight_requantization"):
        if text not in ("0", "1"):
            raise QuantizationError(f"{name.upper()}={text!r} is neither 0 nor 1")
        return text == "1"
    if name == "bf16_linear_requantize_patterns":
        return tuple(pattern.strip() for pattern in text.split(","))
    return text


def is_wide(scale_form: str, scales: int) -> bool:
    """Tells whether scales of bfloat16 weights stay unrounded.

    Args:
        scale_form: One of `SCALE_FORMS`.
        scales: As for `Quantization.is_wide`.
    """
    return scale_form == "wide" or (scale_form == "xla_cpu" and scales >= _WIDE_FROM)

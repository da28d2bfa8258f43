"""The one layout that vLLM's loaders take."""

from portax.converters.base import BaseConverter
from portax.errors import LayoutError
from portax.layouts import HuggingFace


def check_hub_layout(converter: BaseConverter) -> None:
    """Checks that a converter makes the hub's tensors.

    Raises:
        LayoutError: Its layout is another one.
    """
    if not isinstance(converter.layout, HuggingFace):
        raise LayoutError(
            f"vLLM's loaders take the hub's tensors, and this converter makes those of {converter.layout!r}: make it "
            "with layout=portax.layouts.HuggingFace()",
            expected="layout=portax.layouts.HuggingFace()",
            cause="the converter was made for another engine",
        )

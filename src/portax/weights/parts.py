"""Names of blocks where one layer of the trainer is several of the hub's."""

import re

_PART = re.compile(r"(?P<part>\d+)/(?P<of>\d+):(?P<name>.+)")


def part_name(part: int, of: int, name: str) -> str:
    """Returns the name for a block that belongs to one of the hub's layers that a layer of the trainer is.

    Args:
        part: Number of that layer of the hub, from 0.
        of: Number of the hub's layers that one layer of the trainer is.
        name: Module name, relative to the layer of the hub.

    Example:
        >>> part_name(1, 2, "self_attn")
        '1/2:self_attn'
    """
    return f"{part}/{of}:{name}"


def in_hub_layer(name: str, layer: int | None) -> tuple[str, int | None]:
    """Returns a name relative to the hub's layer, and the number of that layer.

    Args:
        name: Name relative to the trainer's layer.
        layer: Number of the trainer's layer; None outside the layers.

    Example:
        >>> in_hub_layer("1/2:self_attn.o_proj.weight", 3), in_hub_layer("norm.weight", None)
        (('self_attn.o_proj.weight', 7), ('norm.weight', None))
    """
    found = _PART.fullmatch(name)
    if found is None or layer is None:
        return name, layer
    return found["name"], layer * int(found["of"]) + int(found["part"])

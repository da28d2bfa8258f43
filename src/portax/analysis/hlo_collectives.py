"""Bytes that devices receive from each other in a compiled program, read off its text."""

import math
import re

_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<name>all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"
    r"(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


def received_bytes(text: str, devices: int) -> int | None:
    """Counts the bytes that all devices together receive from others in one run of a program.

    Counted as the usual algorithms move them: of a group of n, an all-gather or all-to-all receives (n - 1)/n of its
    result, a reduce-scatter n - 1 times its result, an all-reduce 2 (n - 1)/n.

    Args:
        text: The compiled program, `jax.stages.Compiled.as_text()`.
        devices: Number of devices that it runs on.

    Returns:
        The bytes; None if a collective is written in an unknown way.
    """
    found = [_received(line, match, devices) for line in text.splitlines() if (match := _COLLECTIVE.search(line))]
    known = [size for size in found if size is not None]
    return sum(known) if len(known) == len(found) else None


def _received(line: str, match: re.Match[str], devices: int) -> int | None:
    name, arrays = match["name"], [_size(found) for found in _ARRAY.finditer(match["result"])]
    if match["start"]:  # operands and results, and for a permutation two words of its own
        arrays = arrays[1:2] if name == "collective-permute" else arrays[len(arrays) // 2 :]
    size = sum(arrays)
    if name == "collective-permute":
        pairs = _PAIR.findall(line.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        return size * sum(source != target for source, target in pairs)
    group = _group(line, devices)
    if group is None:
        return None
    rounds = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1}.get(name, (group - 1) / group)
    return round(size * rounds * devices)


def _size(array: re.Match[str]) -> int:
    elements = math.prod(int(size) for size in array["shape"].split(",") if size)
    return elements * (int(array["bits"]) // 8 if array["bits"] else 1)


def _group(line: str, devices: int) -> int | None:
    """Returns the number of devices in each group: `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['a'=2,'b'=4] {'b'}`, or all."""
    groups = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return listed[1].count(",") + 1
    if tiled := re.match(r"\[\d+,(\d+)\]", groups):
        return int(tiled[1])
    if named := re.match(r"mesh\[([^\]]*)\].*? \{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices if not groups or groups.startswith("{}") else None

"""`Report`: the common form of all results, for people and for machines; `Progress`, of what takes long."""

import abc
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from portax._text.tables import render

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of bytes done since its last call, and the total."""


class Report(abc.ABC):
    """A result, a dataclass. `print(report)` shows it to people; `report.to_json()` is for machines."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as values for JSON: mappings, lists, texts and finite numbers; by default its fields."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @abc.abstractmethod
    def __rich__(self) -> "RenderableType":
        """Returns the form for people, which rich prints."""

    def to_json(self) -> str:
        """Returns all of it as one JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        return render(self.__rich__()).rstrip("\n")


def no_progress(done: int, total: int) -> None:
    """Takes progress and tells nobody."""

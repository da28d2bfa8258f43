"""`Report`: the common form of all results, for people and for machines."""

import abc
import json
from typing import TYPE_CHECKING, Any

from portax._text.tables import render

if TYPE_CHECKING:
    from rich.console import RenderableType


class Report(abc.ABC):
    """A result. `print(report)` shows it to people; `report.to_json()` is for machines."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as values for JSON: mappings, lists, texts and finite numbers."""

    @abc.abstractmethod
    def __rich__(self) -> "RenderableType":
        """Returns the form for people, which rich prints."""

    def to_json(self) -> str:
        """Returns all of it as one JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        return render(self.__rich__()).rstrip("\n")

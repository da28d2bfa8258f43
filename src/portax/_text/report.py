"""`Report`: the one form of everything that portax has to tell, for people and for machines."""

import abc
import json
from typing import TYPE_CHECKING, Any

from portax._text.tables import render

if TYPE_CHECKING:
    from rich.console import RenderableType


class Report(abc.ABC):
    """Something to tell. `print(report)` shows it to people; `report.to_json()` is for machines."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON has: mappings, lists, texts and finite numbers."""

    @abc.abstractmethod
    def __rich__(self) -> "RenderableType":
        """The same for people, as rich prints it."""

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        return render(self.__rich__()).rstrip("\n")

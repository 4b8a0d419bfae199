"""A JSON object read key by key: every value is checked when it is read, named if refused."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from vitrail.errors import CheckpointError, show


def words(text: str) -> frozenset[str]:
    """A set of names, from a text with blanks between them."""
    return frozenset(text.split())


def is_integer(value: object) -> bool:
    """JSON's true and false are not integers, though Python's are."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, float) or is_integer(value)


class Fields:
    """Values of a JSON object, with the defaults of the keys that it may leave out.

    ``location`` names the object in errors, such as ``config.json (text_config)``. Every reader
    raises CheckpointError if the value has another type or lies outside its range.
    """

    def __init__(
        self, location: str, values: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        self.location = location
        self.values = values
        self.defaults = defaults

    def get(self, key: str) -> Any:
        return self.values[key] if key in self.values else self.defaults[key]

    def refuse(self, key: str, wanted: str) -> NoReturn:
        raise CheckpointError(f"{self.location}: {key}: got {show(self.get(key))}, wanted {wanted}")

    def _checked(self, key: str, accepts: Callable[[Any], bool], wanted: str) -> Any:
        value = self.get(key)
        if not accepts(value):
            self.refuse(key, wanted)
        return value

    def flag(self, key: str) -> bool:
        value: bool = self._checked(key, lambda v: isinstance(v, bool), "true or false")
        return value

    def text(self, key: str) -> str:
        value: str = self._checked(key, lambda v: isinstance(v, str), "a string")
        return value

    def count(self, key: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``."""
        value: int = self._checked(
            key, lambda v: is_integer(v) and low <= v <= high, f"an integer from {low} to {high}"
        )
        return value

    def number(self, key: str, above: float, below: float) -> float:
        """A finite number strictly between the two bounds."""
        value = self._checked(
            key, lambda v: is_number(v) and above < v < below, f"a number in ({above}, {below})"
        )
        return float(value)

    def pair(self, key: str, high: int) -> tuple[int, int]:
        """(height, width) from ``n`` or ``[height, width]``, each from 1 to ``high``."""
        value = self.get(key)
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or not all(is_integer(side) and 1 <= side <= high for side in sides):
            self.refuse(key, f"an integer from 1 to {high}, or [height, width]")
        return sides[0], sides[1]

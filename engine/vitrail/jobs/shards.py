"""Which parts of a job a process writes, if several processes or machines share the job."""

import re
from dataclasses import dataclass

from vitrail.errors import InputError


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard ``index`` of ``count``, from 0: it writes every part whose number % count == index.

    The default is a run that writes all parts. Raises InputError unless 0 <= index < count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(
                f"shard: got {self}, wanted K/N with K from 0 to N - 1, such as 0/4 to 3/4"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard of a text such as "2/4". Raises InputError for another text."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise InputError(f"shard: got {text!r}, wanted K/N, such as 0/4 to 3/4")
        return cls(int(match[1]), int(match[2]))

    @property
    def mark(self) -> str:
        """What tells the names of the shard's own files from those of others: "-2-of-4"."""
        return f"-{self.index}-of-{self.count}" if self.count > 1 else ""

    def parts(self, parts: int) -> range:
        """The shard's part numbers in a job of ``parts`` parts."""
        return range(self.index, parts, self.count)

    def inputs(self, inputs: int, part_size: int) -> int:
        """The number of the shard's inputs in a job of ``inputs`` inputs."""
        starts = range(0, inputs, part_size)
        return sum(min(part_size, inputs - starts[n]) for n in self.parts(len(starts)))


WHOLE = Shard()
"""A run that writes all parts."""

"""One of the parts that the work of a command is divided into, such as the tasks of a scheduler's array are given."""

import re
from typing import NamedTuple


class Shard(NamedTuple):
    """The shard `number`, from 1 on, of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """That of `NUMBER/COUNT`. Raises a `ValueError` if there is no such shard."""
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text!r} is no shard: of eight they are 1/8, 2/8 … 8/8.")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def all_of(cls, count: int) -> list["Shard"]:
        return [cls(number, count) for number in range(1, count + 1)]

    def part(self, length: int) -> range:
        """Its places of `length`: neighbours, so that all shards one after another are all places in their order."""
        return range((self.number - 1) * length // self.count, self.number * length // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

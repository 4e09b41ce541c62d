"""Counts the collectives of a compiled program from its HLO text.

Counted are the collectives that one chip executes in one run of the program: those in the body of a
loop as often as it runs, each with the shapes, and so the bytes, of its result on that chip.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=(%[\w.\-]+), body=(%[\w.\-]+)")


class Collective(NamedTuple):
    """A kind of collective and the shapes that it gives each chip."""

    kind: str
    shapes: tuple[str, ...]

    def num_bytes(self) -> int:
        """Size of its result on one chip."""
        total = 0
        for shape in self.shapes:
            dtype, dims = shape[:-1].split("[")
            width = re.search(r"\d+", dtype)
            bits = int(width[0]) if width else 8  # pred
            total += bits * math.prod(int(dim) for dim in dims.split(",") if dim)
        return total // 8


def collectives(hlo: str) -> Counter[Collective]:
    """How often each collective is executed in one run of the program.

    A TPU compiler may spread one collective over several fusions: they share a channel and count
    once.

    Raises:
      ValueError: if the number of rounds of a loop cannot be read, or a collective stands in a
        computation that nothing seems to call.
    """
    computations = _computations(hlo)
    calls = _times_called(computations)
    found: Counter[Collective] = Counter()
    seen: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.search(line)
            channel = re.search(r"channel_id=(\d+)", line)
            if match is None or (channel and channel[1] in seen):
                continue
            if channel:
                seen.add(channel[1])
            shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(match[1]))
            if match[3] and match[2] == "collective-permute":
                shapes = shapes[1:2]  # an asynchronous start returns operand, result and contexts
            elif match[3] and match[2] != "all-reduce":
                shapes = shapes[len(shapes) // 2 :]  # operands and results
            if not calls[name]:
                raise ValueError(f"found no call of {name}, which holds a collective")
            found[Collective(match[2], shapes)] += calls[name]
    return found


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry is called "ENTRY"."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = "ENTRY" if line.startswith("ENTRY") else line.split(" ")[0]
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations


def _times_called(computations: dict[str, list[str]]) -> Counter[str]:
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            loop = _WHILE.search(line)
            if loop:
                known = re.search(r"known_trip_count\D*(\d+)", line)
                visit(loop[2], count * (int(known[1]) if known else _rounds(computations[loop[1]])))
            else:
                for called in _CALLED.findall(line):
                    for name_called in re.findall(r"%[\w.\-]+", called):
                        visit(name_called, count)

    visit("ENTRY", 1)
    return times


def _rounds(condition: list[str]) -> int:
    """N of a loop whose condition is `i < N`, with i counting from 0 as in `jax.lax.scan`."""
    numbers = set(re.findall(r"s32\[\][^=]* constant\((\d+)\)", "\n".join(condition)))
    if len(numbers) != 1:
        raise ValueError(f"found the constants {sorted(numbers)} in the condition of a loop")
    return int(numbers.pop())

"""Counts the collectives of a compiled program from its HLO text, loops included."""

import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

_INSTRUCTION = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?(%[\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=(%[\w.\-]+), body=(%[\w.\-]+)")


class Collective(NamedTuple):
    """A kind of collective and the shapes that it gives each chip."""

    kind: str
    shapes: tuple[str, ...]

    def num_bytes(self) -> int:
        """Size of its result on one chip."""
        total = 0
        for dtype, dims in (_SHAPE.fullmatch(shape).groups() for shape in self.shapes):  # type: ignore[union-attr]
            size = BYTES[dtype]
            for dim in filter(None, dims.split(",")):
                size *= int(dim)
            total += size
        return total


def collectives(hlo: str) -> Counter[Collective]:
    """How often each collective is executed in one run of the program.

    Those in the body of a loop count as often as it runs. A TPU compiler may spread one collective
    over several fusions: they share a channel and count once.

    Raises:
      ValueError: if the number of rounds of a loop cannot be read.
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
            # An asynchronous start returns its operands as well.
            shapes = shapes[len(shapes) // 2 :] if match[3] and match[2] != "all-reduce" else shapes
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
                visit(loop[2], count * _rounds(computations[loop[1]]))
            else:
                for called in _CALLED.findall(line):
                    visit(called, count)

    visit("ENTRY", 1)
    return times


def _rounds(condition: list[str]) -> int:
    """N of a loop whose condition is `i < N`, with i counting from 0."""
    numbers = set(re.findall(r"s32\[\][^=]* constant\((\d+)\)", "\n".join(condition)))
    if len(numbers) != 1:
        raise ValueError(f"found the constants {sorted(numbers)} in the condition of a loop")
    return int(numbers.pop())

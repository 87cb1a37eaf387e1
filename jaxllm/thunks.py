"""What a GPU is told to do, launch by launch, as XLA dumps it.

With `xla_dump_to` XLA writes `*thunk_sequence_after_thunk_passes.txt` beside the HLO:
one line a thunk, those that it contains indented below it. A `kCommandBuffer` is a CUDA
graph: everything in it is one launch of the host. Read with jax 0.10.2, 0.11.2 and 0.12.0;
a dump that has no such file gives None.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILES = "*thunk_sequence_after_thunk_passes.txt"

GRAPH = "kCommandBuffer"
LOOP = "kWhile"

# Thunks that launch nothing themselves: they hold others, or wait for one.
HOLDERS = frozenset({GRAPH, LOOP, "kConditional", "kDynamicSliceFusion", "kSequential"})
WAITS = frozenset({"kAsyncDone"})

LINE = re.compile(r"(?P<indent> *)\d+: (?P<kind>k\w+) *(?:\[[^\]]*\])? *(?P<text>.*)")
SECTION = re.compile(r"(?P<indent> *)(?P<name>\w+):\s*")


@dataclass(slots=True)
class Thunk:
    """One thing that the runtime does."""

    kind: str
    """XLA's name, such as kCustomKernel or kCommandBuffer."""

    name: str
    """Of the kernel, where it is one."""

    section: str = ""
    """Which part of the thunk around it: `condition` or `body` of a loop."""

    inside: list["Thunk"] = field(default_factory=list)

    def part(self, section: str) -> list["Thunk"]:
        """Returns what it holds in one of its sections."""
        return [thunk for thunk in self.inside if thunk.section == section]

    def launches(self) -> Iterator["Thunk"]:
        """Yields what it launches, conditions of loops apart; itself, if it holds nothing."""
        if not self.inside and self.kind not in HOLDERS | WAITS:
            yield self
        for thunk in self.inside:
            if thunk.section != "condition":
                yield from thunk.launches()


def parse(text: str) -> list[Thunk]:
    """Returns the thunks of a dump, those that stand alone."""
    top: list[Thunk] = []
    holders: list[tuple[int, Thunk]] = []  # thunks around the current line, outermost first
    sections: dict[int, str] = {}
    last: Thunk | None = None
    for line in text.splitlines():
        found = LINE.fullmatch(line)
        if found:
            indent = len(found["indent"])
            while holders and holders[-1][0] >= indent:
                holders.pop()
            last = Thunk(found["kind"], found["text"].split(" ", 1)[0])
            if holders:
                last.section = sections.get(id(holders[-1][1]), "")
            (holders[-1][1].inside if holders else top).append(last)
            holders.append((indent, last))
            continue
        section = SECTION.fullmatch(line)
        if section and last is not None:
            # The first section stands at the left margin, under its thunk; the second is
            # indented by less than what the first holds.
            indent = len(section["indent"])
            open_ones = [thunk for at, thunk in holders if at < indent]
            owner = open_ones[-1] if open_ones else last
            sections[id(owner)] = section["name"]
    return top


def loops(thunks: Sequence[Thunk]) -> Iterator[Thunk]:
    """Yields every loop, outer ones before those that they hold."""
    for thunk in thunks:
        if thunk.kind == LOOP:
            yield thunk
        yield from loops(thunk.inside)


def is_one_graph(thunks: Sequence[Thunk]) -> bool:
    """Whether a sequence is a single CUDA graph, and nothing else."""
    return [thunk.kind for thunk in thunks] == [GRAPH]


def outside_graphs(thunks: Sequence[Thunk]) -> list[Thunk]:
    """Returns what breaks a sequence up: all that is no graph, and what that holds."""
    found = []
    for thunk in thunks:
        if thunk.kind != GRAPH and thunk.section != "condition":
            found += [thunk, *outside_graphs(thunk.inside)]
    return found


def read(folder: Path) -> list[Thunk] | None:
    """Returns the thunks of the one program dumped into a folder; None if it has none.

    Raises:
        ValueError: The folder has dumps of several programs.
    """
    files = sorted(folder.glob(FILES))
    if len(files) > 1:
        raise ValueError(f"{str(folder)!r} has the thunks of {len(files)} programs; use one each.")
    return parse(files[0].read_text()) if files else None

"""Bytes that a compiled program reads and writes in memory, counted from its HLO.

XLA's own `cost_analysis` counts the body of a loop once and a scatter as its whole
operand. Here:

- an instruction counts as often as it runs: its computation times the trips of the
  loops around it (`Module.runs`);
- what stands inside a fusion costs nothing; an operand of a fusion is read once, and
  only as far as its result needs it: a fusion that gathers rows of a table reads rows;
- an update in place (`dynamic-update-slice`, `scatter`) writes its updates and reads
  nothing of what it updates.

Caches of the device are not modelled: what two instructions read counts twice. Nor is
a kernel that reads an operand tile by tile more than once.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.hlo import FUSIONS, IN_PLACE, Array, Instruction, Module, root_of

# Opcodes that take a part of their first operand: as many elements as they give.
TAKES = frozenset({"dynamic-slice", "gather", "slice"})

# Opcodes that need all of every operand, however little of their result is used. All
# others need an element for an element.
WHOLE = frozenset(
    {
        "all-gather",
        "all-reduce",
        "concatenate",
        "convolution",
        "custom-call",
        "dot",
        "fusion",
        "pad",
        "reduce",
        "reduce-window",
        "sort",
    }
)


class Paged(NamedTuple):
    """Pages that a kernel of ours reads and writes in part; they are the first axis."""

    slots: int
    """Number of the operand that says where each token is written."""

    table: int
    """Number of the operand that says which pages are read."""

    axis: int
    """Which axis of the pages is their slots."""


# By the kernel's name, and the number of the operand.
PAGED = {"jaxllm_paged_attention": {3: Paged(5, 6, axis=3), 4: Paged(5, 6, axis=2)}}

# Opcodes that cost no memory traffic of their own.
FREE = frozenset(
    {
        "after-all",
        "async-start",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "tuple",
        "while",
    }
)


@dataclass(frozen=True, slots=True)
class Access:
    """What one call of a program does with one of its arguments."""

    argument: str | None
    """The argument's path, such as `params[3]`; None: all that is made on the way."""

    read: int
    """Bytes."""

    written: int
    """Bytes; of an argument, those that are overwritten in place."""


def accesses(module: Module) -> tuple[Access, ...]:
    """Returns the bytes that one call moves, an entry for each argument it touches."""
    read: Counter[str | None] = Counter()
    written: Counter[str | None] = Counter()
    scratch = _Unread(module)
    for where, instruction in module.running:
        if is_free(instruction):
            continue
        runs = module.runs(where)
        for argument, num_bytes in _reads(module, where, instruction):
            read[argument] += runs * num_bytes
        for argument, num_bytes in _writes(module, where, instruction, scratch):
            written[argument] += runs * num_bytes
    arguments = sorted({*read, *written}, key=str)
    return tuple(Access(name, read[name], written[name]) for name in arguments)


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction only names, groups or waits: nothing is launched for it."""
    return instruction.opcode in FREE or instruction.opcode.endswith("-done")


def _reads(
    module: Module, where: str, instruction: Instruction
) -> Iterator[tuple[str | None, int]]:
    known = module.computations[where]
    updated = {module.updated_operand(instruction, i) for i in range(len(instruction.arrays))}
    touched = _paged(instruction)
    for number, name in enumerate(instruction.operands):
        if name not in known:
            continue
        if number in touched:
            pages, table = (known[instruction.operands[i]] for i in (number, touched[number].table))
            page = pages.arrays[0].num_bytes // pages.arrays[0].shape[0]
            yield _argument(module, where, name, 0), page * table.arrays[0].size
            continue
        for part, array in enumerate(known[name].arrays):
            needed = _needed(module, instruction, number, array.size, name in updated)
            yield _argument(module, where, name, part), array.bytes_of(needed)


def _needed(
    module: Module, instruction: Instruction, number: int, size: int, is_updated: bool
) -> int:
    """Returns how many elements of an operand an instruction reads."""
    if instruction.opcode in FUSIONS:
        return min(size, _used_parameters(module, instruction).get(number, 0))
    if number == 0 and is_updated:
        return 0
    if number == 0 and instruction.opcode in TAKES:
        return min(size, instruction.arrays[0].size)
    return size


def _writes(
    module: Module, where: str, instruction: Instruction, scratch: "_Unread"
) -> Iterator[tuple[str | None, int]]:
    for part, (array, maker) in enumerate(module.results(instruction)):
        updated = module.updated_operand(instruction, part)
        if updated is not None:
            fused = instruction.opcode in FUSIONS
            inside = module.body(instruction) if fused else module.computations[where]
            yield _argument(module, where, updated, 0), _updated(inside, maker, part, array)
        elif not (instruction.opcode == "custom-call" and scratch.has(where, instruction, part)):
            yield None, array.num_bytes


def _updated(known: Mapping[str, Instruction], maker: Instruction, part: int, array: Array) -> int:
    """Returns the bytes of a result that are new."""
    if maker.opcode != "custom-call":
        update = maker.operands[1 if maker.opcode == "dynamic-update-slice" else -1]
        return known[update].arrays[0].num_bytes
    paged = _paged(maker).get(maker.overwrites[part])
    if paged is None:
        return array.num_bytes
    of_token = array.size // array.shape[0] // array.shape[paged.axis]
    return array.bytes_of(of_token * known[maker.operands[paged.slots]].arrays[0].size)


def _paged(instruction: Instruction) -> dict[int, Paged]:
    """Returns the entry of `PAGED` of an instruction; nothing if it has none."""
    if instruction.opcode != "custom-call":
        return {}
    name = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    found = (paged for prefix, paged in PAGED.items() if name and name[1].startswith(prefix))
    return next(found, {})


def _argument(module: Module, where: str, name: str, part: int) -> str | None:
    origin = module.origin(where, name, part)
    return None if origin is None else origin.source or origin.name


def _used_parameters(module: Module, fusion: Instruction) -> dict[int, int]:
    """Returns how many elements of each parameter a fusion reads, by the parameter's number.

    Goes from the results to the parameters: of each value, how many elements are used.
    """
    body = module.computations[fusion.attribute("calls")]
    root = root_of(body)
    results = root.operands if root.opcode == "tuple" else (root.name,)
    used: defaultdict[str, int] = defaultdict(int)
    for name in results:
        used[name] = sum(array.size for array in body[name].arrays)
    in_place = {
        maker.name
        for part, (_, maker) in enumerate(module.results(fusion))
        if module.updated_operand(fusion, part) is not None
    }
    for inner in reversed(body.values()):  # operands come before their users
        if not used[inner.name]:
            continue
        nested = _used_parameters(module, inner) if inner.opcode in FUSIONS else {}
        for number, name in enumerate(inner.operands):
            if name not in body:
                continue
            size = sum(array.size for array in body[name].arrays)
            wanted = nested.get(number, 0) if nested else _wanted(inner, number, size, used)
            if number == 0 and inner.name in in_place:
                wanted = 0
            used[name] = min(size, used[name] + wanted)
    return {
        int(inner.operands[0]): used[inner.name]
        for inner in body.values()
        if inner.opcode == "parameter"
    }


def _wanted(inner: Instruction, number: int, size: int, used: dict[str, int]) -> int:
    """Returns how many elements of an operand are needed for those used of the result."""
    amount = used[inner.name]
    if inner.opcode in WHOLE or (number > 0 and inner.opcode in TAKES | IN_PLACE):
        return size
    if inner.opcode in ("bitcast", "bitcast-convert"):  # another element type, perhaps
        result = sum(array.size for array in inner.arrays)
        return -(-amount * size // max(1, result))
    return min(size, amount)


class _Unread:
    """Parts of results that nothing reads: the workspaces of library calls."""

    def __init__(self, module: Module) -> None:
        self._read: set[tuple[str, str, int]] = set()
        self._tuples: set[tuple[str, str]] = set()
        for where, instruction in module.running:
            for name in instruction.operands:
                if instruction.opcode == "get-tuple-element":
                    self._read.add((where, name, int(instruction.attribute("index"))))
                else:
                    self._tuples.add((where, name))

    def has(self, where: str, instruction: Instruction, part: int) -> bool:
        """Whether nothing reads this part of an instruction's result."""
        if len(instruction.arrays) < 2 or (where, instruction.name) in self._tuples:
            return False
        return not instruction.is_root and (where, instruction.name, part) not in self._read

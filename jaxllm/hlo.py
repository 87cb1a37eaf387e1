"""Optimised HLO as data: computations, their instructions, and where a value comes from.

The text that `Compiled.as_text()` gives has one instruction a line,
`%name = type opcode(operands), attributes`. What stands inside a fusion never
reaches memory, so only computations that run instruction by instruction count:
the entry, bodies of loops, branches. This file knows nothing of a model.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

# Attributes that name a computation which runs instruction by instruction.
RUN = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
RUNNING = frozenset({"while", "conditional", "call", "async-start"})

# Opcodes whose result is the memory of their operand.
ALIASES = frozenset({"bitcast", "opt-barrier", "while"})

# Opcodes that write into their first operand. Where something else still reads it,
# XLA has put in a copy, which is an instruction of its own.
IN_PLACE = frozenset({"dynamic-update-slice", "scatter"})

FUSIONS = frozenset({"fusion", "fusion-start"})

# Which of the arrays of an instruction that only starts are its results.
STARTS = {
    "all-gather-start": lambda count: slice(count // 2, None),
    "collective-permute-start": lambda count: slice(1, 2),
    "copy-start": lambda count: slice(0, 1),
    "reduce-scatter-start": lambda count: slice(count // 2, None),
}

# Which results of a library's call are written over which of its operands, and one of them.
OVERWRITE = r"\{(\d*)\}: \((\d+), \{\}(?:, [\w-]+)?\)"
OVERWRITES = re.compile(rf"output_to_operand_aliasing=\{{((?:{OVERWRITE}(?:, )?)+)\}}")

ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
WIDTH = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Array:
    """An element type and a shape."""

    dtype: str
    """XLA's name, such as bf16 or s32."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes; a type narrower than a byte is packed."""
        return self.bytes_of(self.size)

    def bytes_of(self, num_elements: int) -> int:
        """Returns the bytes of some of its elements."""
        width = WIDTH.search(self.dtype)
        bits = int(width[0]) if width else 8  # pred; a token has size 1 and costs nothing real
        return -(-num_elements * bits // 8)

    def __str__(self) -> str:
        """Returns XLA's spelling."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    """Its result; several where that is a tuple."""

    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def source(self) -> str:
        """The path of the operation in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Returns the value of `name=value`, or nothing."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        """How often a `while` runs its body; None where the compiler does not know."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def overwrites(self) -> dict[int, int]:
        """Of a custom call: the numbers of results, and of the operands they are written over."""
        found = OVERWRITES.search(self.attributes)
        pairs = re.findall(OVERWRITE, found[1]) if found else ()
        return {int(part or 0): int(number) for part, number in pairs}

    def called(self) -> list[str]:
        """Returns the names of the computations it mentions."""
        names = []
        for one, several in RUN.findall(self.attributes):
            names += [one] if one else [name.strip(" %") for name in several.split(",")]
        return names


class Module:
    """The computations of a compiled program."""

    def __init__(self, text: str) -> None:
        """Parses the text of an optimised module."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif line.startswith("  ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        self._callers: dict[str, list[tuple[str, Instruction]]] = {}
        self.running = list(self._run())
        """Pairs of computation and instruction, of all that is not inside a fusion."""

    def _run(self) -> Iterator[tuple[str, Instruction]]:
        names = [self.entry]
        for name in names:
            for instruction in self.computations[name].values():
                yield name, instruction
                if instruction.opcode in RUNNING:
                    for called in instruction.called():
                        self._callers.setdefault(called, []).append((name, instruction))
                        if called not in names:
                            names.append(called)

    def runs(self, computation: str) -> int:
        """Returns how often a computation runs in one call of the program.

        A loop whose length the compiler does not know counts once, and so does each
        branch of a `conditional`. The condition of a loop of known length never runs.
        """
        if computation == self.entry:
            return 1
        return sum(
            self.runs(outer) * _times(instruction, computation)
            for outer, instruction in self._callers[computation]
        )

    def body(self, instruction: Instruction) -> dict[str, Instruction]:
        """Returns the instructions inside a fusion; of another one, itself."""
        if instruction.opcode not in FUSIONS:
            return {instruction.name: instruction}
        return self.computations[instruction.attribute("calls")]

    def source(self, instruction: Instruction) -> str:
        """Returns the path of an instruction, of a fusion that has none that of its last step."""
        if instruction.source:
            return instruction.source
        paths = [inner.source for inner in self.body(instruction).values() if inner.source]
        return paths[-1] if paths else ""

    def results(self, instruction: Instruction) -> list[tuple[Array, Instruction]]:
        """Returns what an instruction writes, and by what: inside, if it is a fusion."""
        arrays = instruction.arrays
        if instruction.opcode in FUSIONS:
            body = self.body(instruction)
            root = root_of(body)
            makers = []
            for name in root.operands if root.opcode == "tuple" else (root.name,):
                makers += [_through_bitcasts(body, name)] * len(body[name].arrays)
            # One that starts is a tuple of its operands, then of its results.
            return list(zip(arrays[-len(makers) :], makers, strict=True))
        if instruction.opcode in STARTS:
            arrays = arrays[STARTS[instruction.opcode](len(arrays))]
        return [(array, instruction) for array in arrays]

    def origin(self, computation: str, name: str, part: int = 0) -> Instruction | None:
        """Returns the entry parameter whose memory a value is, or None.

        Followed are bitcasts, tuples, loops (what a loop carries is its initial
        value, updated in place) and in-place updates.

        Args:
            computation: Where the value is named.
            name: Of the value.
            part: Which array, where the value is a tuple.
        """
        instruction = self.computations[computation][name]
        if instruction.opcode == "parameter":
            return self._origin_of_parameter(computation, instruction, part)
        if instruction.opcode == "get-tuple-element":
            part = int(instruction.attribute("index"))
            return self.origin(computation, instruction.operands[0], part)
        if instruction.opcode == "tuple":
            return self.origin(computation, instruction.operands[part])
        if instruction.opcode in ALIASES:
            return self.origin(computation, instruction.operands[0], part)
        updated = self.updated_operand(instruction, part)
        return None if updated is None else self.origin(computation, updated)

    def _origin_of_parameter(
        self, computation: str, parameter: Instruction, part: int
    ) -> Instruction | None:
        if computation == self.entry:
            return parameter
        found = []
        for outer, caller in self._callers[computation]:
            number = 0 if caller.opcode == "while" else int(parameter.operands[0])
            if caller.opcode == "conditional":  # operand 0 chooses; each branch has one of the rest
                number = 1 + caller.called().index(computation)
            found.append(self.origin(outer, caller.operands[number], part))
        # What several callers pass is one argument only where they all pass the same.
        return found[0] if all(one == found[0] for one in found) else None

    def updated_operand(self, instruction: Instruction, part: int = 0) -> str | None:
        """Returns the operand that one of its results overwrites in place, or None."""
        if instruction.opcode == "custom-call":
            number = instruction.overwrites.get(part)
            return None if number is None else instruction.operands[number]
        results = self.results(instruction)
        if part >= len(results) or results[part][1].opcode not in IN_PLACE:
            return None
        result = results[part][1]
        if instruction.opcode not in FUSIONS:
            return result.operands[0]
        updated = _through_bitcasts(self.body(instruction), result.operands[0])
        if updated.opcode != "parameter":
            return None
        return instruction.operands[int(updated.operands[0])]


def _times(caller: Instruction, computation: str) -> int:
    """Returns how often one run of an instruction runs a computation that it calls."""
    if caller.trip_count is None:
        return 1
    return 0 if caller.attribute("condition") == computation else caller.trip_count


def _parse(line: str) -> Instruction:
    name, _, value = line.strip().partition(" = ")
    kind, value = _split_type(value)
    opcode, _, rest = value.partition("(")
    inside, _, attributes = rest.partition(")")
    operands = re.findall(r"%([\w.\-]+)", inside) if "%" in inside else [inside.strip()]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in ARRAY.findall(kind)
    )
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        arrays=arrays,
        opcode=opcode,
        operands=tuple(operands),
        attributes=attributes,
        is_root=name.startswith("ROOT "),
    )


def _split_type(value: str) -> tuple[str, str]:
    """Splits `type opcode(...` after the type, which may be a tuple of types."""
    depth = 0
    for i, char in enumerate(value):
        depth += (char in "({") - (char in ")}")
        if char == " " and depth == 0:
            return value[:i], value[i + 1 :]
    return value, ""


def root_of(body: dict[str, Instruction]) -> Instruction:
    """Returns the instruction whose value a computation has."""
    return next(instruction for instruction in body.values() if instruction.is_root)


def _through_bitcasts(body: dict[str, Instruction], name: str) -> Instruction:
    instruction = body[name]
    while instruction.opcode == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction

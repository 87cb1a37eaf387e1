"""What the compiler made of a program: memory, copies, loops and collectives.

Read from a compiled program, for a device that is here or only compiled for
(`sharding.gpu_topology`). A tool for tests and for planning, never part of a step;
it knows no model. Sizes are those of one device.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxllm.hlo import Array, Instruction, Module

# Opcodes that change where or in which type data lies, and not what it is.
MOVING = frozenset(
    {
        "bitcast",
        "bitcast-convert",
        "broadcast",
        "constant",
        "convert",
        "copy",
        "copy-start",
        "dynamic-slice",
        "pad",
        "parameter",
        "reshape",
        "reverse",
        "slice",
        "transpose",
        "tuple",
    }
)

# Opcodes that write nothing, or whose computations are looked at instead.
SILENT = frozenset(
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

# Opcodes that multiply or select: what they give is no form of a whole operand, even
# where it has as many elements.
MAKING = frozenset({"convolution", "custom-call", "dot", "gather"})

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclass(frozen=True, slots=True)
class Write:
    """An array that an instruction writes to memory."""

    opcode: str
    """Of the instruction; of a fusion, what computes its result."""

    array: Array
    moves: bool
    """Whether nothing is computed: a copy, or a fusion of slices, transposes, converts."""

    in_place: bool
    """Whether only parts of an operand are overwritten, as by a scatter into the cache."""

    rewrites: str | None
    """The argument that it reads, and gives as many elements anew: a copied cache,
    a copied, transposed, converted or dequantised weight."""

    computation: str
    """Where it happens: the entry, or the body of a loop."""

    source: str
    """The path of the operation in the traced program."""


@dataclass(frozen=True, slots=True)
class Collective:
    """A transfer between devices."""

    opcode: str
    """One of `COLLECTIVES`."""

    arrays: tuple[Array, ...]
    """What one device has afterwards."""

    source: str

    @property
    def num_bytes(self) -> int:
        """Bytes that one device has afterwards."""
        return sum(array.num_bytes for array in self.arrays)


@dataclass(frozen=True, slots=True)
class Loop:
    """A `while`."""

    trip_count: int | None
    """None where the compiler does not know it: a GPU then asks the host each time."""

    body: str
    """The computation that repeats."""

    source: str


@dataclass(frozen=True, slots=True)
class ProgramReport:
    """One compiled program."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Bytes of donated arguments whose memory the results take over."""

    temp_bytes: int
    writes: tuple[Write, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]

    def moves(self, at_least: int) -> list[Write]:
        """Returns what only moves this many bytes or more."""
        return [w for w in self.writes if w.moves and w.array.num_bytes >= at_least]

    def rewritten(self, at_least: int) -> list[Write]:
        """Returns copies of whole arguments of this many bytes or more, in any form."""
        return [w for w in self.writes if w.rewrites and w.array.num_bytes >= at_least]

    def count(self, opcode: str, within: str = "") -> int:
        """Returns the number of collectives of an opcode.

        Args:
            opcode: One of `COLLECTIVES`.
            within: Part of the path in the traced program, such as a function's name.
        """
        return sum(c.opcode == opcode and within in c.source for c in self.collectives)


def report(compiled: jax.stages.Compiled) -> ProgramReport:
    """Reads a compiled program.

    Raises:
        ValueError: Its platform gives no HLO, or does not say what memory it takes.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ValueError("This platform of JAX gives no HLO or no memory analysis to report on.")
    module = Module(text)
    return ProgramReport(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        writes=tuple(_writes(module)),
        collectives=tuple(_collectives(module)),
        loops=tuple(_loops(module)),
    )


def _writes(module: Module) -> Iterator[Write]:
    for where, instruction in module.running:
        opcode = instruction.opcode
        if opcode in SILENT or opcode.endswith("-done"):
            continue
        moves = all(_moves(inner) for inner in module.body(instruction).values())
        for i, (array, result) in enumerate(module.results(instruction)):
            in_place = module.updated_operand(instruction, i) is not None
            yield Write(
                opcode=result.opcode,
                array=array,
                moves=moves,
                in_place=in_place,
                rewrites=None if in_place else _rewritten(module, where, instruction, array),
                computation=where,
                source=instruction.source,
            )


def _moves(inner: Instruction) -> bool:
    """Whether it computes nothing, the index of a slice apart."""
    return inner.opcode in MOVING or all(array.size == 1 for array in inner.arrays)


def _rewritten(module: Module, where: str, instruction: Instruction, array: Array) -> str | None:
    """The argument among an instruction's operands that has as many elements as its result."""
    if any(inner.opcode in MAKING for inner in module.body(instruction).values()):
        return None
    known = module.computations[where]
    for name in instruction.operands:
        argument = module.origin(where, name) if name in known else None
        if argument is not None and argument.arrays[0].size == array.size:
            return argument.source or argument.name
    return None


def _collectives(module: Module) -> Iterator[Collective]:
    for _, instruction in module.running:
        # From jax 0.12 on a small one can be the only instruction of a fusion.
        for inner in module.body(instruction).values():
            opcode = inner.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                arrays = tuple(array for array, _ in module.results(inner))
                yield Collective(opcode, arrays, inner.source)


def _loops(module: Module) -> Iterator[Loop]:
    for _, instruction in module.running:
        if instruction.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
            yield Loop(
                trip_count=int(trips[1]) if trips else None,
                body=instruction.attribute("body"),
                source=instruction.source,
            )

"""What the compiler made of a program: memory, copies, loops and collectives.

Read from a compiled program, for a device that is here or only compiled for
(`sharding.gpu_topology`). A tool for tests and for planning, never part of a step;
it knows no model. Sizes are those of one device.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxllm.hlo import Array, Instruction, Module
from jaxllm.traffic import Access, accesses, is_free

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

    takes: str | None
    """The argument of which it only moves a part: a slice made into an array of its own."""

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
    runs: int
    """How often, in one call of the program."""

    devices: int
    """That take part together; 0: all there are."""

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
class Launch:
    """An instruction that something is launched for: a fusion, a library's or our kernel, a copy.

    On a GPU it is one kernel, with few exceptions; on CPU one operation.
    """

    opcode: str
    runs: int
    """How often, in one call of the program."""

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
    accesses: tuple[Access, ...]
    """Bytes read and written in one call, an entry for each argument."""

    launches: tuple[Launch, ...]

    def moves(self, at_least: int) -> list[Write]:
        """Returns what only moves this many bytes or more."""
        return [w for w in self.writes if w.moves and w.array.num_bytes >= at_least]

    def rewritten(self, at_least: int) -> list[Write]:
        """Returns copies of whole arguments of this many bytes or more, in any form."""
        return [w for w in self.writes if w.rewrites and w.array.num_bytes >= at_least]

    def copied(self, of: tuple[str, ...], at_least: int) -> list[Write]:
        """Returns what copies arguments or slices of them, in any form, into new arrays.

        Args:
            of: How the paths of the arguments begin.
            at_least: Bytes of the new array.
        """
        return [
            write
            for write in self.writes
            if (write.rewrites or write.takes or "").startswith(of)
            and write.array.num_bytes >= at_least
        ]

    def num_launches(self, within: str = "") -> int:
        """Returns the launches of one call.

        Args:
            within: Part of the path in the traced program, such as a function's name.
        """
        return sum(launch.runs for launch in self.launches if within in launch.source)

    def bytes_read(self, argument: str) -> int:
        """Returns the bytes read in one call of arguments whose path begins so."""
        return sum(a.read for a in self.accesses if (a.argument or "").startswith(argument))

    def bytes_written(self, argument: str) -> int:
        """Returns the bytes overwritten in one call of arguments whose path begins so."""
        return sum(a.written for a in self.accesses if (a.argument or "").startswith(argument))

    @property
    def bytes_accessed(self) -> int:
        """All bytes read and written in one call, of arguments and of what is made on the way."""
        return sum(a.read + a.written for a in self.accesses)

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
        accesses=accesses(module),
        launches=tuple(_launches(module)),
    )


def _writes(module: Module) -> Iterator[Write]:
    for where, instruction in module.running:
        if is_free(instruction):
            continue
        moves = all(_moves(inner) for inner in module.body(instruction).values())
        for i, (array, result) in enumerate(module.results(instruction)):
            in_place = module.updated_operand(instruction, i) is not None
            arguments = [] if in_place else _arguments(module, where, instruction)
            yield Write(
                opcode=result.opcode,
                array=array,
                moves=moves,
                in_place=in_place,
                rewrites=_rewritten(module, instruction, array, arguments),
                takes=_name(arguments[0]) if moves and arguments else None,
                computation=where,
                source=instruction.source,
            )


def _moves(inner: Instruction) -> bool:
    """Whether it computes nothing, the index of a slice apart."""
    return inner.opcode in MOVING or all(array.size == 1 for array in inner.arrays)


def _arguments(module: Module, where: str, instruction: Instruction) -> list[Instruction]:
    """Returns the arguments of the program among an instruction's operands."""
    known = module.computations[where]
    found = [module.origin(where, name) for name in instruction.operands if name in known]
    return [argument for argument in found if argument is not None]


def _rewritten(
    module: Module, instruction: Instruction, array: Array, arguments: list[Instruction]
) -> str | None:
    """The argument among an instruction's operands that has as many elements as its result."""
    if any(inner.opcode in MAKING for inner in module.body(instruction).values()):
        return None
    same = (a for a in arguments if a.arrays[0].size == array.size)
    return next((_name(argument) for argument in same), None)


def _name(argument: Instruction) -> str:
    return argument.source or argument.name


def _collectives(module: Module) -> Iterator[Collective]:
    for where, instruction in module.running:
        # From jax 0.12 on a small one can be the only instruction of a fusion.
        for inner in module.body(instruction).values():
            opcode = inner.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                arrays = tuple(array for array, _ in module.results(inner))
                devices = _group_size(inner.attributes)
                yield Collective(opcode, arrays, inner.source, module.runs(where), devices)


def _group_size(attributes: str) -> int:
    """Returns how many devices a collective has in each of its groups; 0 where it does not say."""
    # Three spellings: axes of a mesh, groups x size over a list of all, or the groups.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d, ]*)\}", attributes)
    return len(found[1].split(",")) if found else 0


def _loops(module: Module) -> Iterator[Loop]:
    for _, instruction in module.running:
        if instruction.opcode == "while":
            yield Loop(
                trip_count=instruction.trip_count,
                body=instruction.attribute("body"),
                source=instruction.source,
            )


def _launches(module: Module) -> Iterator[Launch]:
    for where, instruction in module.running:
        if not is_free(instruction) and module.runs(where):
            source = module.source(instruction)
            yield Launch(instruction.opcode, module.runs(where), source)

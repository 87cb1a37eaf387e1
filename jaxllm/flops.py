"""Floating-point operations of a compiled program, counted from its HLO.

Matrix products only, two operations for each multiplication: beside them the rest is of
no account. Attention is left out where it is a kernel of ours, whose keys are known to data
alone. XLA's own `cost_analysis` counts the body of a loop once and a library's product as
nothing; here an instruction counts as often as it runs.
"""

import math
import re
from collections.abc import Mapping

from jaxllm.hlo import FUSIONS, Instruction, Module

LINEAR = 'custom_call_target="jaxllm_linear_'
"""The kernel of products with weights: tokens [T, K] and a weight -> [T, N]."""

# XLA's own products, and cuBLAS's, whose dimensions are in a JSON of the instruction.
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')


def flops(module: Module) -> int:
    """Returns the operations of one call of a program, on one device."""
    return sum(
        runs * _of(module, module.computations[where], instruction)
        for where, instruction in module.running
        if (runs := module.runs(where))
    )


def _of(module: Module, known: Mapping[str, Instruction], instruction: Instruction) -> int:
    if instruction.opcode in FUSIONS:
        body = module.body(instruction)
        return sum(_of(module, body, inner) for inner in body.values())
    if LINEAR in instruction.attributes:
        return 2 * instruction.arrays[0].size * known[instruction.operands[0]].arrays[0].shape[1]
    found = CONTRACTED.search(instruction.attributes)
    if found is None or instruction.opcode not in ("dot", "custom-call"):
        return 0
    left = known[instruction.operands[0]].arrays[0].shape
    contracted = math.prod(left[int(axis)] for axis in re.findall(r"\d+", found[1]))
    return 2 * instruction.arrays[0].size * contracted

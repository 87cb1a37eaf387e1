"""The least time that a machine needs for a workload: bytes to read, products to make.

For prompts and outputs of any lengths, on devices as measured; `jaxllm.roofline` is about one
step of a layout, on devices that need not be here.
"""

from dataclasses import dataclass

from jaxllm.bench.workload import Workload
from jaxllm.cache.kv_cache import bytes_per_token
from jaxllm.loading import Plan
from jaxllm.machine import Machine
from jaxllm.roofline import is_head, is_table


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model costs: bytes that a step reads, operations of a token."""

    weight_bytes: int
    """Read by every step: all parameters but tables of which a token reads one row."""

    kv_bytes: int
    """Keys and values of one token, over all layers."""

    token_flops: int
    """Of a token through the layers, attention apart."""

    logit_flops: int
    """Of a token that is sampled, through the output head."""

    attention_flops: int
    """Of a token, for each token that it attends to."""

    max_num_seqs: int

    def floor_seconds(self, workload: Workload, machine: Machine) -> float:
        """Returns the least time for a workload: prompts first, then as few decode steps as can be.

        Each part takes at least its operations at the measured rate, and at least its
        bytes: prompts read the weights once, a decode step reads them once and the keys
        and values of each of its rows. Windows that leave keys out are not counted.
        """
        pairs = list(zip(workload.input_lens, workload.output_lens, strict=True))
        flops = sum(n * self.token_flops + self.logit_flops for n, _ in pairs)
        flops += sum(n * (n + 1) // 2 for n, _ in pairs) * self.attention_flops
        prompts = self._seconds(flops, self.weight_bytes, machine)

        new = [out - 1 for _, out in pairs]  # the first comes of the prompt
        # The i-th of them attends to the prompt, to those before it and to itself.
        seen = sum(out * n + out * (out + 1) // 2 for (n, _), out in zip(pairs, new, strict=True))
        steps = max(max(new), -(-sum(new) // self.max_num_seqs))
        flops = sum(new) * (self.token_flops + self.logit_flops) + seen * self.attention_flops
        read = steps * self.weight_bytes + seen * self.kv_bytes
        return prompts + self._seconds(flops, read, machine)

    def _seconds(self, flops: int, num_bytes: int, machine: Machine) -> float:
        slowest = max(flops / machine.flops_per_s, num_bytes / machine.read_bytes_per_s)
        return slowest / machine.num_devices


def model_work(plan: Plan) -> ModelWork:
    """Returns what a loaded model costs."""
    model, config = plan.model, plan.config
    head = next(leaf for leaf in model.leaves if is_head(model, leaf))
    layers = [x for x in model.leaves if x is not head and not is_table(model, x)]
    return ModelWork(
        weight_bytes=sum(leaf.num_bytes for leaf in (*layers, head)),
        kv_bytes=bytes_per_token(model.cache_specs, plan.engine.dtype),
        token_flops=2 * sum(leaf.shape.size for leaf in layers if leaf.num_in),
        logit_flops=2 * head.shape.size,
        attention_flops=4 * config.num_layers * config.num_heads * config.head_dim,
        max_num_seqs=plan.engine.max_num_seqs,
    )

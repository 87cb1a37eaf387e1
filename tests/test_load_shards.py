"""Loading into shards: what is read, once, and by whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.loading import Wishes, load_params, plan_load
from jaxllm.modeling.weights import Source
from jaxllm.sharding.choice import sharders
from tests import xla
from tests.layouts import EIGHT_HEADS
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parent.parent
WISHES = Wishes(max_model_len=48, max_num_seqs=2, cache_bytes=1 << 20)

# Joins a group of two processes with four devices each, and loads its share.
SCRIPT = """
import json, sys
from pathlib import Path
import jax, numpy as np
address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
from jaxllm import distributed
distributed.initialize(address, num_processes=2, process_id=index)
from jaxllm.loading import Wishes, load_params, plan_load
from jaxllm.modeling.weights import Source
from jaxllm.sharding.choice import sharders

read, count = Source.read, [0]
def counted(self, index, zeros):
    shard = read(self, index, zeros)
    count[0] += shard.nbytes
    return shard
Source.read = counted

(sharder,) = sharders("tensor", 8)
wishes = Wishes(max_model_len=48, max_num_seqs=2, cache_bytes=1 << 20)
plan = plan_load(folder, wishes, sharder, "auto")
params = load_params(plan, seed=0, show_progress=False)
needed = 0
for param in params:
    shards = {str(shard.index): shard.data.nbytes for shard in param.addressable_shards}
    needed += sum(shards.values())
total, read = plan.model.num_bytes, count[0]

from jaxllm.modeling.checkpoint import checksum
from jaxllm.peers import peers_of
from jaxllm.saving import save
sums = [checksum(param) for param in params]
save(sys.argv[4], plan, params, tokenizer_folder=folder, peers=peers_of(sharder.mesh))
again = plan_load(Path(sys.argv[4]), wishes, sharder, "auto")
back = [checksum(param) for param in load_params(again, seed=0, show_progress=False)]
print(json.dumps({"read": read, "needed": needed, "total": total, "same": sums == back}))
"""


@pytest.mark.parametrize(
    "how",
    [
        {"tensor": 8},
        {"layout": "tensor_2d", "tensor": 8},
        {"layout": "replicated", "tensor": 4},
        {"layout": {"mesh": {"x": 4, "y": 2}, "rules": {"mlp": "x"}}},
    ],
)
def test_each_shard_is_read_once_however_many_devices_have_it(checkpoints, monkeypatch, how):
    read, seen = Source.read, {}

    def counted(self, index, zeros):
        shard = read(self, index, zeros)
        seen[self.leaf.path] = seen.get(self.leaf.path, 0) + shard.nbytes
        return shard

    monkeypatch.setattr(Source, "read", counted)
    plan = plan_load(checkpoints("llama", **EIGHT_HEADS), WISHES, sharders(**how)[0], "auto")

    load_params(plan, seed=0, show_progress=False)

    assert seen == {leaf.path: leaf.num_bytes for leaf in plan.model.leaves}


@pytest.mark.slow
def test_each_process_reads_only_its_share_and_all_save_together(tmp_path, unused_port):
    folder = tiny_checkpoint(tmp_path / "model", num_attention_heads=8, num_key_value_heads=8)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(4),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, f"localhost:{unused_port}"]
    running = [
        subprocess.Popen(
            [*command, str(i), str(folder), str(tmp_path / "saved")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]

    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()

    for output in outputs:
        counted = json.loads(output.splitlines()[-1])
        assert counted["read"] == counted["needed"] < 0.6 * counted["total"]
        assert counted["same"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_shared_shard_is_right_on_every_device(checkpoints):
    folder = checkpoints("llama", **EIGHT_HEADS)
    one = plan_load(folder, WISHES, sharders()[0], "auto")
    split = {"mesh": {"x": 4, "y": 2}, "rules": {"mlp": "x"}}
    many = plan_load(folder, WISHES, sharders(split)[0], "auto")

    values = load_params(one, seed=0, show_progress=False)
    params = load_params(many, seed=0, show_progress=False)

    for value, param in zip(values, params, strict=True):
        for shard in param.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(value)[shard.index])
    assert len({d for param in params for d in param.devices()}) == jax.device_count()

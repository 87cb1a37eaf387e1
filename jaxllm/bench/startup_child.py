"""The process that `startup` starts: prints as JSON how long each phase took."""

import json
import sys
import time
from typing import Any

from jaxllm.bench.counts import read_counts
from jaxllm.bench.trace import run
from jaxllm.bench.workload import Sizes
from jaxllm.errors import JaxLLMError
from jaxllm.llm import LLM


def start(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `Startup`, or the `error` of one that cannot be.

    Args:
        spec: When the process was `born` (seconds since 1970), its `model`, `llm_options`
            and `input_len`.
    """
    imported = time.time()
    try:
        with LLM(spec["model"], **spec["llm_options"]) as llm:
            constructed = time.time()
            vocab_size = llm._plan.config.vocab_size
            run(llm, Sizes(1, spec["input_len"], 1).draw(vocab_size, seed=0))
            return {
                "imports": imported - spec["born"],
                "construct": constructed - imported,
                "first_token": time.time() - constructed,
                "compile": read_counts(llm).compile_seconds,
            }
    except JaxLLMError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(start(json.loads(sys.argv[1])))}\n")

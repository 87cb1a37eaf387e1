"""What users of vLLM see when something is wrong, row by row, with the words they search for.

The rows are those of the errors that vLLM's offline engine raises. Where vLLM raises a
`ValueError`, so do we; what jaxllm has not is refused with a sentence that says so.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import (
    LLM,
    CheckpointError,
    ConfigError,
    FamilyImportError,
    JaxLLMError,
    RequestError,
    SamplingParams,
    UnsupportedModelError,
)
from jaxllm.demo.tokenizer import train_tokenizer
from jaxllm.modeling import registry
from tests.tiny import tiny_checkpoint

MAX_LEN = 32
SMALL = {
    "max_model_len": MAX_LEN,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 20,
    "use_tqdm_on_load": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=2)
HELLO = [{"role": "user", "content": "hello"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@dataclass
class World:
    """What the rows act on."""

    folder: Path
    """A whole checkpoint, of which a row may spoil a copy."""

    scratch: Path
    llm: LLM
    monkeypatch: pytest.MonkeyPatch
    made: list[LLM] = field(default_factory=list)

    def load(self, model=None, **options):
        self.made.append(LLM(model or self.folder, **{**SMALL, **options}))

    def config(self, *removed, **fields):
        """Loads a copy whose config.json is changed."""
        copy = self.copy()
        stated = json.loads((copy / "config.json").read_text())
        stated = {k: v for k, v in {**stated, **fields}.items() if k not in removed}
        (copy / "config.json").write_text(json.dumps(stated))
        self.load(copy)

    def copy(self, *removed):
        """A copy, without some of its files."""
        copy = shutil.copytree(self.folder, self.scratch / "copy")
        for name in removed:
            (copy / name).unlink()
        return copy

    def weights(self, change):
        """Loads a copy whose tensors are changed."""
        copy = self.copy()
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors")
        self.load(copy)

    def broken_family(self):
        self.monkeypatch.setitem(registry.ARCHITECTURES, "LlamaForCausalLM", "broken")
        self.monkeypatch.setattr(
            registry.importlib, "import_module", lambda name: ModuleType(name).absent
        )
        self.load()

    def generate(self, prompts="ab", params=GREEDY, **options):
        self.llm.generate(prompts, params, use_tqdm=False, **options)

    def plain_chat(self):
        """Talks with a model whose tokenizer has no template."""
        copy = self.copy()
        (copy / "chat_template.jinja").unlink(missing_ok=True)
        stated = json.loads((copy / "tokenizer_config.json").read_text())
        stated.pop("chat_template", None)
        (copy / "tokenizer_config.json").write_text(json.dumps(stated))
        self.load(copy)
        self.made[-1].chat(HELLO, GREEDY)

    def closed(self):
        self.load()
        self.made[-1].close()
        self.made[-1].generate("ab", GREEDY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=300)
    train_tokenizer(["ab abc"], vocab_size=258, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **SMALL) as llm:
        yield llm


@pytest.fixture
def world(folder, llm, tmp_path, monkeypatch):
    world = World(folder, tmp_path, llm, monkeypatch)
    yield world
    for made in world.made:
        made.close()


pytestmark = pytest.mark.filterwarnings("ignore:task= of LLM is runner=:DeprecationWarning")

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

ROWS = {
    # ------------------------------------------------------------ models
    "unsupported architecture": (
        lambda w: w.config(architectures=["FooModel"]),
        UnsupportedModelError,
        r"Model architectures \['FooModel'\] are not supported for now.*Supported architectures:",
    ),
    "architectures missing": (
        lambda w: w.config("architectures"),
        UnsupportedModelError,
        r"top-level 'architectures'.*hf_overrides=\{'architectures': \['\.\.\.'\]\}",
    ),
    "architectures empty": (
        lambda w: w.config(architectures=[]),
        UnsupportedModelError,
        "No model architectures are specified",
    ),
    "architecture import problem": (
        lambda w: w.broken_family(),
        FamilyImportError,
        "failed to be inspected.*AttributeError",
    ),
    "bad folder": (
        lambda w: w.load("/no/such/folder"),
        CheckpointError,
        "Invalid repository ID or local directory specified: '/no/such/folder'",
    ),
    "bad repo id": (
        lambda w: w.load("org/my model"),
        CheckpointError,
        "Invalid repository ID or local directory specified: 'org/my model'.*The hub says",
    ),
    "no config.json": (
        lambda w: w.load(w.copy("config.json")),
        CheckpointError,
        "Invalid repository ID or local directory specified: .* has no config.json",
    ),
    "config needs code": (
        lambda w: w.config(model_type="own", auto_map={"AutoConfig": "own.Own"}),
        UnsupportedModelError,
        "auto_map names code of the repository, which jaxllm never runs",
    ),
    "no weight files": (
        lambda w: w.load(w.copy("model.safetensors")),
        CheckpointError,
        "Cannot find any model weights with `.*copy`",
    ),
    "missing tensor": (
        lambda w: w.weights(lambda tensors: tensors.pop(Q_PROJ)),
        CheckpointError,
        f"Following weights were not initialized from checkpoint: '{Q_PROJ}' is missing",
    ),
    "extra tensor": (
        lambda w: w.weights(lambda tensors: tensors.update(extra=tensors[Q_PROJ])),
        CheckpointError,
        "There is no module or parameter named 'extra'",
    ),
    "shape mismatch": (
        lambda w: w.weights(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][1:]})),
        CheckpointError,
        rf"'{Q_PROJ}' has shape \[31, 32\] and the config asks for \[32, 32\]",
    ),
    # ------------------------------------------------------------ sizes and memory
    "max_model_len too large": (
        lambda w: w.load(max_model_len=129),
        ConfigError,
        r"User-specified max_model_len \(129\) is greater than the derived max_model_len "
        r"\(max_position_embeddings=128\).*JAXLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
    ),
    "max_model_len unparsable": (
        lambda w: w.load(max_model_len="many"),
        ConfigError,
        "max_model_len='many' is neither a number of tokens nor 'auto'",
    ),
    "max_model_len below one": (
        lambda w: w.load(max_model_len=0),
        ConfigError,
        "max_model_len=0 is neither",
    ),
    "no KV memory": (
        lambda w: w.load(kv_cache_memory_bytes=1),
        ConfigError,
        "No available memory for the cache blocks.*Try increasing `gpu_memory_utilization`",
    ),
    "KV too small for one sequence": (
        lambda w: w.load(kv_cache_memory_bytes=20_000, block_size=16, max_model_len=128),
        ConfigError,
        r"To serve at least one request with the model's max seq len \(128\).*KV cache is needed"
        r".*available.*estimated maximum model length is 48",
    ),
    "dtype invalid": (lambda w: w.load(dtype="float8"), ConfigError, "Unknown dtype 'float8'"),
    "budget below sequences": (
        lambda w: w.load(max_num_batched_tokens=1),
        ConfigError,
        r"max_num_batched_tokens \(1\) must be greater than or equal to max_num_seqs \(2\)",
    ),
    "budget below length without chunking": (
        lambda w: w.load(enable_chunked_prefill=False),
        ConfigError,
        r"max_num_batched_tokens \(16\) is smaller than max_model_len \(32\)",
    ),
    "gpu_memory_utilization out of range": (
        lambda w: w.load(gpu_memory_utilization=1.5),
        ConfigError,
        "gpu_memory_utilization=1.5 must be greater than 0 and at most 1",
    ),
    "unknown keyword": (
        lambda w: w.load(max_modellen=5),
        TypeError,
        "unexpected keyword argument 'max_modellen'; did you mean 'max_model_len'",
    ),
    # ------------------------------------------------------------ requests
    "prompt too long": (
        lambda w: w.generate([[1] * 40]),
        RequestError,
        "maximum context length is 32 tokens. However, your prompt contains 40 input tokens",
    ),
    "text too long": (
        lambda w: w.generate("a b " * 30),
        RequestError,
        "maximum context length is 32 tokens. However, your prompt contains .* input tokens",
    ),
    "text obviously too long": (
        lambda w: w.generate("a" * 100_000),
        RequestError,
        "maximum context length is 32 tokens. However, your prompt contains at least",
    ),
    "no room for a token": (
        lambda w: w.generate([[1] * MAX_LEN]),
        RequestError,
        "maximum context length is 32 tokens.*at least 1",
    ),
    "empty text": (lambda w: w.generate(""), RequestError, "The decoder prompt cannot be empty"),
    "empty tokens": (
        lambda w: w.generate({"prompt_token_ids": []}),
        RequestError,
        "Token prompt should be a list of integers",
    ),
    "token out of range": (
        lambda w: w.generate([[300]]),
        RequestError,
        "Token id 300 is out of vocabulary",
    ),
    "sampling parameter": (
        lambda w: w.generate(params=SamplingParams(temperature=-1)),
        RequestError,
        "temperature must be .*, got -1",
    ),
    "length of params": (
        lambda w: w.generate(["ab", "ab"], [GREEDY]),
        RequestError,
        r"lengths of prompts \(2\) and params \(1\) must be the same",
    ),
    "no chat template": (
        lambda w: w.plain_chat(),
        RequestError,
        "4.44.*Pass chat_template=",
    ),
    "template raises": (
        lambda w: w.llm.chat(HELLO, chat_template="{{ raise_exception('roles must alternate') }}"),
        RequestError,
        "roles must alternate",
    ),
    "engine is gone": (lambda w: w.closed(), JaxLLMError, "is closed. Make a new one"),
    # ------------------------------------------------------------ what jaxllm has not
    "pooling": (lambda w: w.load(runner="pooling"), ConfigError, "runner='pooling' is not impl"),
    "task": (lambda w: w.load(task="embed"), ConfigError, "task='embed' is not implemented"),
    "convert": (lambda w: w.load(convert="embed"), ConfigError, "convert='embed' is not impl"),
    "tensor parallel": (
        lambda w: w.load(tensor_parallel_size=3),
        ConfigError,
        "num_attention_heads=4 does not divide over tensor=3 of layout 'tensor'. Sizes that work "
        "with the model: tensor=1, 2, 4",
    ),
    "pipeline parallel": (
        lambda w: w.load(pipeline_parallel_size=2),
        ConfigError,
        "pipeline_parallel_size=2 is not implemented",
    ),
    "data parallel": (
        lambda w: w.load(data_parallel_size=9),
        ConfigError,
        r"World size \(9\) is larger than the number of available devices \(8\): data 9",
    ),
    "unknown quantization": (
        lambda w: w.load(quantization="best"),
        ConfigError,
        "quantization='best' is not implemented",
    ),
    "fp8 on unquantized": (
        lambda w: w.load(quantization="fp8"),
        ConfigError,
        "quantization='fp8' is not implemented",
    ),
    "quantized checkpoint": (
        lambda w: w.config(quantization_config={"quant_method": "gptq"}),
        UnsupportedModelError,
        "quant_method='gptq'.*unquantized",
    ),
    "fp8 cache": (
        lambda w: w.load(kv_cache_dtype="fp8"),
        ConfigError,
        "kv_cache_dtype='fp8' is not implemented",
    ),
    "LoRA": (lambda w: w.load(enable_lora=True), ConfigError, "enable_lora=True is not impl"),
    "LoRA off": (
        lambda w: w.generate(lora_request=object()),
        RequestError,
        "Got lora_request but LoRA is not enabled!.*not implemented",
    ),
    "images in a chat": (
        lambda w: w.llm.chat(IMAGE, chat_template="{{ messages }}"),
        RequestError,
        "this model is text only",
    ),
    "images in a prompt": (
        lambda w: w.generate({"prompt": "ab", "multi_modal_data": {"image": 1}}),
        RequestError,
        "'multi_modal_data'.*text",
    ),
    "embeddings in a prompt": (
        lambda w: w.generate({"prompt_embeds": [[0.0]]}),
        RequestError,
        "embeddings as prompts are not implemented",
    ),
    "prompt embeds": (
        lambda w: w.load(enable_prompt_embeds=True),
        ConfigError,
        "enable_prompt_embeds=True is not implemented",
    ),
    "speculation": (
        lambda w: w.load(speculative_config={"model": "x"}),
        ConfigError,
        "speculative_config=.* is not implemented",
    ),
    "structured outputs": (
        lambda w: w.generate(params=SamplingParams(structured_outputs={"json": "{}"})),
        TypeError,
        "structured outputs are not implemented",
    ),
    "load format": (
        lambda w: w.load(load_format="pt"),
        ConfigError,
        "load_format='pt' is not supported. Use",
    ),
    "tokenizer mode": (
        lambda w: w.load(tokenizer_mode="mistral"),
        ConfigError,
        "tokenizer_mode='mistral' is not implemented",
    ),
}
"""What is done, the type of what is raised, and words of its message."""


@pytest.mark.parametrize("row", ROWS)
def test_error_has_its_type_and_its_words_and_the_next_request_is_answered(world, row):
    act, kind, words = ROWS[row]

    with pytest.raises(kind, match=f"(?s){words}") as caught:
        act(world)

    assert type(caught.value) is kind
    world.generate()
    assert world.llm.stats()["num_pages_held"] == 0


def test_errors_that_callers_can_mend_are_value_errors():
    kinds = {kind for _, kind, _ in ROWS.values()} - {TypeError, JaxLLMError, FamilyImportError}

    assert {ConfigError, RequestError, CheckpointError, UnsupportedModelError} <= kinds
    assert all(issubclass(kind, ValueError) and issubclass(kind, JaxLLMError) for kind in kinds)

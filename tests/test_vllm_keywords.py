import re
import warnings

import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.keywords import ExplainsKeywords
from jaxllm.vllm_keywords import _IGNORED_BECAUSE, ALIASES, IGNORED, NOT_YET, translate


def words(text):
    return text.split()


OWN = words("""
    model tokenizer tokenizer_mode skip_tokenizer_init dtype seed revision tokenizer_revision
    tensor_parallel_size data_parallel_size layout devices
    hf_token hf_overrides trust_remote_code load_format download_dir max_model_len max_num_seqs
    max_num_batched_tokens gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override
    block_size enable_prefix_caching enable_chunked_prefill max_logprobs logprobs_mode
    async_scheduling
    generation_config override_generation_config chat_template use_tqdm_on_load enforce_eager
""")
"""The keywords that `LLM` has itself."""

# All that vLLM's LLM and its EngineArgs take, as far as scripts are known to pass it.
OF_VLLM = words("""
    model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code
    allowed_local_media_path allowed_media_domains tensor_parallel_size dtype quantization
    revision tokenizer_revision chat_template seed gpu_memory_utilization cpu_offload_gb
    offload_group_size offload_num_in_group offload_prefetch_step offload_params enforce_eager
    enable_return_routed_experts return_sampling_mask disable_custom_all_reduce hf_token
    hf_overrides mm_processor_kwargs pooler_config structured_outputs_config profiler_config
    attention_config kv_cache_memory_bytes compilation_config quantization_config
    logits_processors spec_method spec_model spec_tokens max_model_len max_num_seqs
    max_num_batched_tokens enable_prefix_caching enable_chunked_prefill block_size kv_cache_dtype
    num_gpu_blocks_override pipeline_parallel_size distributed_executor_backend load_format
    download_dir ignore_patterns config_format hf_config_path code_revision served_model_name
    generation_config override_generation_config max_logprobs logprobs_mode
    disable_sliding_window limit_mm_per_prompt language_model_only mm_processor_cache_gb
    skip_mm_profiling enable_prompt_embeds enable_lora max_loras max_lora_rank max_cpu_loras
    lora_dtype fully_sharded_loras lora_target_modules speculative_config scheduling_policy
    scheduler_reserve_full_isl long_prefill_token_threshold disable_log_stats model_impl
    use_tqdm_on_load async_scheduling optimization_level performance_mode enable_sleep_mode
    enable_expert_parallel kv_offloading_size reasoning_parser attention_backend
    allow_deprecated_quantization worker_cls worker_extension_cls additional_config
    kv_transfer_config watermark max_num_active_seqs max_num_scheduled_tokens
    max_num_queued_reqs max_num_queued_tokens prefill_schedule_interval renderer_num_workers
    use_fp64_gumbel enable_trace_replay watermark_config device_ids cudagraph_capture_sizes
    max_cudagraph_capture_size diffusion_config model_weights model_class_overrides
    task override_pooler_config override_neuron_config use_v2_block_manager num_lookahead_slots
    device max_seq_len_to_capture swap_space preemption_mode disable_async_output_proc
    worker_use_ray num_scheduler_steps guided_decoding_backend
""")

TABLES = {"OWN": OWN, "ALIASES": ALIASES, "IGNORED": IGNORED, "NOT_YET": NOT_YET}


@pytest.fixture
def log(caplog):
    """What the library warns of, as it is said."""
    with caplog.at_level("WARNING", "jaxllm"):
        yield caplog


# ---------------------------------------------------------------- the tables


def test_no_keyword_is_in_two_tables():
    places = {}
    for table, names in TABLES.items():
        for name in names:
            places.setdefault(name, []).append(table)

    assert {name: tables for name, tables in places.items() if len(tables) > 1} == {}


def test_no_keyword_has_two_reasons():
    assert sum(len(names.split()) for names in _IGNORED_BECAUSE.values()) == len(IGNORED)


@pytest.mark.parametrize("name", OF_VLLM)
def test_every_keyword_of_vllm_is_known(name):
    assert name in OWN or any(name in table for table in TABLES.values())


@pytest.mark.parametrize("name", ALIASES.values())
def test_aliases_lead_to_a_known_keyword(name):
    assert name in OWN or name in NOT_YET or name in IGNORED


# ---------------------------------------------------------------- what passes


def test_own_and_unknown_keywords_are_left_alone(log):
    kwargs = {name: object() for name in OWN} | {"max_model_lenght": 5}

    assert translate(kwargs) == kwargs
    assert log.messages == []


def test_what_was_passed_is_not_changed():
    kwargs = {"pipeline_parallel_size": 1, "seed": 3}

    assert translate(kwargs) == {"seed": 3}
    assert kwargs == {"pipeline_parallel_size": 1, "seed": 3}


# ---------------------------------------------------------------- what is ignored


def test_ignored_keywords_are_said_in_one_warning_with_reasons(log):
    left = translate(
        {"swap_space": 4, "seed": 1, "compilation_config": 3, "cudagraph_capture_sizes": [1, 2]}
    )

    assert left == {"seed": 1}
    assert log.messages == [
        "keywords of vLLM that change nothing here: "
        "swap_space (the cache has pages of one kind, on the device); "
        "compilation_config, cudagraph_capture_sizes (XLA compiles each shape once and keeps it)"
    ]


@pytest.mark.parametrize("name", IGNORED)
def test_every_ignored_keyword_is_dropped(name, log):
    assert translate({name: 1}) == {}
    assert translate({name: None}) == {}
    assert len(log.messages) == 1  # None is what vLLM has by default


# ---------------------------------------------------------------- what is renamed


def test_old_name_is_renamed_with_a_deprecation_warning():
    message = r"forced_num_gpu_blocks= of LLM is num_gpu_blocks_override= in newer versions"
    with pytest.warns(DeprecationWarning, match=message):
        left = translate({"forced_num_gpu_blocks": 7})

    assert left == {"num_gpu_blocks_override": 7}


@pytest.mark.parametrize("task", ["auto", "generate"])
def test_task_of_a_generating_model_is_accepted(task):
    with pytest.warns(DeprecationWarning, match="task= of LLM is runner="):
        assert translate({"task": task}) == {}


@pytest.mark.parametrize("task", ["embed", "embedding", "classify", "score", "reward"])
def test_task_of_a_pooling_model_is_refused_as_it_was_typed(task):
    with (
        pytest.warns(DeprecationWarning, match="task="),
        pytest.raises(ConfigError, match=f"task='{task}' is not implemented. jaxllm generates"),
    ):
        translate({"task": task})


@pytest.mark.parametrize("names", [("task", "runner"), ("runner", "task")])
def test_old_and_new_name_together_are_refused(names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ConfigError, match=f"'{names[0]}' and '{names[1]}' are the same keyword. Pass only 'ru"
        ):
            translate(dict.fromkeys(names, "generate"))


def test_deprecation_is_shown_where_the_keyword_was_typed():
    class Model(metaclass=ExplainsKeywords):
        def __init__(self, model):
            self.model = model

        @classmethod
        def _translate_keywords(cls, kwargs):
            return translate(kwargs)

    with pytest.warns(DeprecationWarning, match="task=") as caught:
        Model(model="a", task="generate")

    assert [warning.filename for warning in caught] == [__file__]


# ---------------------------------------------------------------- what is not implemented


@pytest.mark.parametrize("name", NOT_YET)
def test_values_that_change_nothing_are_dropped_in_silence(name, log):
    for value in (None, *NOT_YET[name].neutral):
        assert translate({name: value}) == {}
    assert log.messages == []


@pytest.mark.parametrize("name", NOT_YET)
@pytest.mark.parametrize("value", ["something", 2, {"a": 1}, np.array([1, 1]), object], ids=str)
def test_values_that_would_change_something_are_refused(name, value):
    instead = re.escape(NOT_YET[name].instead)

    with pytest.raises(ConfigError, match=rf"^{name}=.* is not implemented\. {instead}$"):
        translate({name: value})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"quantization": "awq"}, "quantization='awq' is not implemented. Weights are used in"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 .* Pass tensor_parallel_size in"),
        ({"decode_context_parallel_size": 2}, "=2 is not implemented. A sequence is not divided"),
        ({"enable_expert_parallel": True}, "No model here has experts. Leave it out"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not implemented. The cache has the"),
        ({"cpu_offload_gb": 10.0}, "cpu_offload_gb=10.0 is not implemented. All weights are on"),
        ({"runner": "pooling"}, "runner='pooling' is not implemented. jaxllm generates text"),
        ({"enable_lora": True}, "enable_lora=True is not implemented. Merge the adapter"),
        ({"rope_theta": 1e6}, r"rope_theta=1000000.0 .* Pass hf_overrides=\{'rope_theta': ...\}"),
        ({"speculative_config": {"a": "b" * 200}}, "speculative_config={'a': 'b+… is not impl"),
    ],
)
def test_refusal_says_what_there_is(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        translate(kwargs)


def test_numbers_of_numpy_may_change_nothing():
    assert translate({"pipeline_parallel_size": np.int64(1), "cpu_offload_gb": np.float32(0)}) == {}

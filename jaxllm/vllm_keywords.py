"""Keywords of vLLM's `LLM` that jaxllm's has not: tables, and what is done about each.

A script written for vLLM should run or say why not. A keyword that only tunes vLLM's
machinery is dropped, with one warning; one that has another name now is renamed; one
that would change what comes out is refused unless its value changes nothing. Keywords
that are in no table are left in: either they are `LLM`'s own, or they are unknown.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

from jaxllm.errors import ConfigError

logger = logging.getLogger("jaxllm")

ALIASES = {
    "task": "runner",
    "override_pooler_config": "pooler_config",
    "forced_num_gpu_blocks": "num_gpu_blocks_override",
}
"""Old names, and those that vLLM has now."""

_IGNORED_BECAUSE = {
    "XLA compiles each shape once and keeps it": """
        compilation_config cudagraph_capture_sizes max_cudagraph_capture_size cuda_graph_sizes
        max_seq_len_to_capture optimization_level performance_mode kernel_config jit_monitor_config
    """,
    "kernels follow the device": """
        attention_backend attention_config disable_cascade_attn disable_custom_all_reduce
        moe_backend use_fp64_gumbel kv_sharing_fast_prefill override_attention_dtype
        enable_flashinfer_autotune linear_backend
    """,
    "all runs in this process": """
        distributed_executor_backend worker_cls worker_extension_cls worker_use_ray
        engine_use_ray ray_workers_use_nsight max_parallel_loading_workers placement_group
        master_addr master_port nnodes node_rank renderer_num_workers tokens_only
        enable_fault_tolerance engine_recovery_timeout internal_fault_report_port
        external_fault_notify_port gloo_comm_timeout shutdown_on_fault_tolerance_failure
        distributed_timeout_seconds enable_multiprocessing
    """,
    "replicas are engines of this process: data_parallel_size and devices say which": """
        data_parallel_rank data_parallel_start_rank data_parallel_size_local
        data_parallel_address data_parallel_rpc_port data_parallel_hybrid_lb
        data_parallel_external_lb data_parallel_backend dcp_kv_cache_interleave_size
        cp_kv_cache_interleave_size dcp_comm_backend all2all_backend enable_dbo ubatch_size
        dbo_decode_token_threshold dbo_prefill_token_threshold
        disable_nccl_for_dp_synchronization enable_eplb eplb_config num_redundant_experts
        eplb_window_size eplb_step_interval eplb_log_balancedness expert_placement_strategy
        enable_ep_weight_filter
    """,
    "JAX chooses devices: set JAX_PLATFORMS or CUDA_VISIBLE_DEVICES before Python starts": """
        device device_ids
    """,
    "the scheduler has no such choice": """
        disable_async_output_proc long_prefill_token_threshold
        max_num_partial_prefills max_long_partial_prefills max_num_active_seqs
        max_num_scheduled_tokens max_num_queued_reqs max_num_queued_tokens
        prefill_schedule_interval scheduler_reserve_full_isl scheduler_delay_factor
        num_scheduler_steps multi_step_stream_outputs num_lookahead_slots preemption_mode
        stream_interval watermark
    """,
    "the cache has pages of one kind, on the device": """
        swap_space use_v2_block_manager prefix_caching_hash_algo disable_hybrid_kv_cache_manager
        kv_offloading_backend kv_events_config mamba_cache_dtype mamba_ssm_cache_dtype
        mamba_block_size mamba_cache_mode calculate_kv_scales prefix_cache_retention_interval
        offload_num_in_group offload_prefetch_step offload_params offload_backend
    """,
    "LLM.stats() counts always": """
        disable_log_stats disable_log_requests aggregate_engine_logging
        show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
        kv_cache_metrics kv_cache_metrics_sample cudagraph_metrics
        enable_layerwise_nvtx_tracing enable_mfu_metrics enable_mm_processor_stats
        enable_logging_iteration_details enable_trace_replay profiler_config
        collect_model_forward_time collect_model_execute_time max_log_len
    """,
    "models read text only": """
        limit_mm_per_prompt language_model_only mm_processor_kwargs mm_processor_cache_gb
        mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_encoder_only
        mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_tensor_ipc
        enable_mm_embeds interleave_mm_strings media_io_kwargs video_pruning_rate
        skip_mm_profiling allowed_local_media_path allowed_media_domains
        disable_mm_preprocessor_cache disable_chunked_mm_input
    """,
    "adapters are not implemented, and enable_lora=True is refused": """
        max_loras max_lora_rank max_cpu_loras lora_dtype fully_sharded_loras
        lora_target_modules lora_extra_vocab_size long_lora_scaling_factors enable_lora_bias
        default_mm_loras enable_tower_connector_lora specialize_active_lora
        enable_mixed_moe_lora_format
    """,
    "structured outputs are not implemented, and SamplingParams refuses them": """
        structured_outputs_config guided_decoding_backend guided_decoding_disable_fallback
        guided_decoding_disable_any_whitespace guided_decoding_disable_additional_properties
    """,
    "thinking is what is between <think> and </think>": """
        reasoning_parser reasoning_parser_plugin reasoning_config enable_reasoning
    """,
    "only configs, tokenizers and *.safetensors are read, and no code": """
        ignore_patterns code_revision model_loader_extra_config pt_load_map_location
        safetensors_load_strategy safetensors_prefetch_num_threads
        safetensors_prefetch_block_size allow_deprecated_quantization
    """,
    "tokenizing is done here, in order": """
        tokenizer_pool_size tokenizer_pool_type tokenizer_pool_extra_config
    """,
    "it is of vLLM's server or of its other platforms": """
        served_model_name logits_processor_pattern additional_config override_neuron_config
        enable_auto_tool_choice tool_call_parser
    """,
}
IGNORED = {name: reason for reason, names in _IGNORED_BECAUSE.items() for name in names.split()}
"""Keywords that change nothing here, and why."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """A keyword that would change what comes out, and is not implemented."""

    neutral: tuple[Any, ...]
    """Values with which it changes nothing; None is one always."""

    instead: str
    """What is, or what to do."""


_TEXT = "jaxllm generates text and has no pooling models. Leave it out."
_WEIGHTS = "Weights are used in `dtype`. Pass a checkpoint that is not quantized, and leave it out."
_NO_PIPELINE = "Layers are not divided. Pass tensor_parallel_size in its place."
_NO_CONTEXT = "A sequence is not divided. Pass tensor_parallel_size in its place."
_ON_DEVICE = "All weights are on the device. Pass a smaller model, or dtype='bfloat16'."
_CACHE = "The cache has the dtype of the model, on the device. Pass a smaller max_model_len."
_DRAFT = "Each step makes one token a sequence. Leave it out: the output is the same."
_ROPE = "Pass hf_overrides={{{!r}: ...}}."
_CONFIG = "The model's config.json is read; hf_overrides changes what it says."
_OWN = "Models are jaxllm's own. Leave it out."
_RETURNED = "Outputs hold tokens, texts and log-probabilities. Leave it out."

NOT_YET = {
    "runner": NotYet(("auto", "generate"), _TEXT),
    "convert": NotYet(("auto", "none"), _TEXT),
    "pooler_config": NotYet((), _TEXT),
    "quantization": NotYet((), _WEIGHTS),
    "quantization_config": NotYet(({},), _WEIGHTS),
    "quantization_param_path": NotYet((), _WEIGHTS),
    "pipeline_parallel_size": NotYet((1,), _NO_PIPELINE),
    "prefill_context_parallel_size": NotYet((1,), _NO_CONTEXT),
    "decode_context_parallel_size": NotYet((1,), _NO_CONTEXT),
    "enable_expert_parallel": NotYet((False,), "No model here has experts. Leave it out."),
    "cpu_offload_gb": NotYet((0,), _ON_DEVICE),
    "offload_group_size": NotYet((0,), _ON_DEVICE),
    "kv_cache_dtype": NotYet(("auto",), _CACHE),
    "kv_offloading_size": NotYet((0,), _CACHE),
    "kv_transfer_config": NotYet(({},), _CACHE),
    "ec_transfer_config": NotYet(({},), _CACHE),
    "weight_transfer_config": NotYet(({},), "Make a new LLM with the new weights."),
    "speculative_config": NotYet(({},), _DRAFT),
    "spec_method": NotYet((), _DRAFT),
    "spec_model": NotYet((), _DRAFT),
    "spec_tokens": NotYet((0,), _DRAFT),
    "speculative_model": NotYet((), _DRAFT),
    "num_speculative_tokens": NotYet((0,), _DRAFT),
    "enable_lora": NotYet((False,), "Merge the adapter into a checkpoint and pass that as model."),
    "enable_prompt_embeds": NotYet((False,), "Prompts are text or token ids."),
    "enable_sleep_mode": NotYet((False,), "LLM.close() frees weights and cache; make a new LLM."),
    "logits_processors": NotYet(
        ([], ()), "SamplingParams has logit_bias, allowed_token_ids, bad_words and penalties."
    ),
    "scheduling_policy": NotYet(("fcfs",), "Requests are run first come, first served."),
    "scheduler_cls": NotYet((), "Requests are run first come, first served."),
    "disable_sliding_window": NotYet(
        (False,), "The model attends as its config.json says. Pass max_model_len to shorten it."
    ),
    "rope_scaling": NotYet(({},), _ROPE.format("rope_scaling")),
    "rope_theta": NotYet((), _ROPE.format("rope_theta")),
    "config_format": NotYet(("auto", "hf"), _CONFIG),
    "hf_config_path": NotYet((), _CONFIG),
    "model_impl": NotYet(("auto", "vllm"), _OWN),
    "model_weights": NotYet(("",), _OWN),
    "model_class_overrides": NotYet(({},), _OWN),
    "diffusion_config": NotYet(({},), _OWN),
    "afd_config": NotYet(({},), _OWN),
    "io_processor_plugin": NotYet(("",), _OWN),
    "watermark_config": NotYet(({},), "Text is not watermarked. Leave it out."),
    "enable_return_routed_experts": NotYet((False,), _RETURNED),
    "return_sampling_mask": NotYet((False,), _RETURNED),
}
"""Keywords that would change what comes out."""


def translate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns what is left for `LLM` of the keywords of a script written for vLLM.

    Keywords of no table are returned as they are; `kwargs` is not changed.

    Raises:
        ConfigError: A keyword asks for what is not implemented, or comes under two names.
    """
    typed = _rename(kwargs)
    left, ignored = {}, []
    for name, (typed_name, value) in typed.items():
        if name in IGNORED:
            if value is not None:
                ignored.append(name)
        elif name in NOT_YET:
            _check_neutral(NOT_YET[name], typed_name, value)
        else:
            left[name] = value
    if ignored:
        logger.warning("keywords of vLLM that change nothing here: %s", _reasons(ignored))
    return left


def _rename(kwargs: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Returns by today's names what was typed: the name and the value."""
    typed: dict[str, tuple[str, Any]] = {}
    for name, value in kwargs.items():
        new = ALIASES.get(name, name)
        if new in typed:
            raise ConfigError(
                f"{typed[new][0]!r} and {name!r} are the same keyword. Pass only {new!r}."
            )
        if new != name:
            # The caller is above translate, LLM's own hook and the metaclass.
            warnings.warn(
                f"{name}= of LLM is {new}= in newer versions of vLLM.",
                DeprecationWarning,
                stacklevel=5,
            )
        typed[new] = (name, value)
    return typed


def _check_neutral(rule: NotYet, name: str, value: Any) -> None:
    """Raises ConfigError unless the value changes nothing."""
    # Arrays have no single truth when compared, and none of them is neutral.
    if value is None or (
        isinstance(value, (str, Number, dict, list, tuple)) and value in rule.neutral
    ):
        return
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
    raise ConfigError(f"{name}={shown} is not implemented. {rule.instead}")


def _reasons(names: list[str]) -> str:
    """Returns the keywords grouped by their reasons."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(IGNORED[name], []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in groups.items())

"""How much is said: one switch for log lines and progress bars."""

import logging

import pytest

from jaxllm import LLM, SamplingParams, logs, set_verbosity
from jaxllm.native import build

SMALL = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 16,
}


@pytest.fixture(autouse=True)
def logger(monkeypatch):
    """The library's logger as a process begins with it, on a machine that has had one before."""
    build.unavailable("float32")
    logger = logging.getLogger("jaxllm")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logs, "_verbosity", "normal")
    for name in ("LOGGING_LEVEL", "CONFIGURE_LOGGING"):
        for prefix in ("JAXLLM", "VLLM"):
            monkeypatch.delenv(f"{prefix}_{name}", raising=False)
    former = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(former)


def said(capsys, checkpoints):
    """What a load, a call and a close write to stderr; nothing goes to stdout."""
    with LLM(checkpoints(), **SMALL) as llm:
        llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=1))
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_first_model_says_a_few_calm_lines(capsys, checkpoints):
    err = said(capsys, checkpoints)

    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("jaxllm:")]
    assert [line.split()[1] for line in lines] == ["Model", f"{checkpoints()}:", "KV", "closed"]
    assert "LlamaForCausalLM" in lines[1]
    assert "float32" in lines[1]
    assert "KV cache size: " in lines[2]
    assert "Loading weights" in err
    assert "Processed prompts" in err


def test_quiet_says_nothing_and_shows_no_bar(capsys, checkpoints):
    set_verbosity("quiet")

    assert said(capsys, checkpoints) == ""


def test_quiet_leaves_warnings(capsys, logger):
    set_verbosity("quiet")

    logger.info("an event")
    logger.warning("a warning")

    assert capsys.readouterr().err == "jaxllm: a warning\n"


def test_debug_says_all(capsys, logger):
    set_verbosity("debug")

    logger.debug("a detail")

    assert capsys.readouterr().err == "jaxllm: a detail\n"


def test_the_last_switch_counts(capsys, checkpoints):
    set_verbosity("quiet")
    set_verbosity("normal")

    assert "KV cache size" in said(capsys, checkpoints)


@pytest.mark.parametrize("verbosity", ["loud", "", None, 1])
def test_unknown_verbosity_lists_the_known_ones(verbosity):
    with pytest.raises(ValueError, match=r"is not one of \['quiet', 'normal', 'debug'\]"):
        set_verbosity(verbosity)


@pytest.mark.parametrize("prefix", ["JAXLLM", "VLLM"])
def test_level_of_the_environment_is_the_first(monkeypatch, logger, prefix):
    monkeypatch.setenv(f"{prefix}_LOGGING_LEVEL", "error")

    assert logs.configure().level == logging.ERROR


def test_handlers_can_be_left_to_the_application(monkeypatch, logger):
    monkeypatch.setenv("JAXLLM_CONFIGURE_LOGGING", "0")

    assert logs.configure().handlers == []
    assert logger.propagate


def test_a_handler_of_the_application_is_the_only_one(logger):
    own = logging.NullHandler()
    logger.addHandler(own)

    for _ in range(2):
        assert logs.configure().handlers == [own]

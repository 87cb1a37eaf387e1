"""`LLM.stats` and `LLM.report`: values to print, to index and to show in a notebook."""

import dataclasses

import pytest

from jaxllm import LLM, SamplingParams

SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": 24,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 16,
    "use_tqdm_on_load": False,
}


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints(), **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, repetition_penalty=1.5)
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
        yield llm


def test_stats_are_frozen_and_a_mapping(llm):
    stats = llm.stats()

    assert stats["num_steps"] == stats.num_steps > 0
    assert set(dict(stats)) == {field.name for field in dataclasses.fields(stats)}
    assert "num_steps" in stats
    assert "values" not in stats
    with pytest.raises(KeyError, match="values"):
        stats["values"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.num_steps = 0


def test_stats_print_a_line_each(llm):
    lines = repr(llm.stats()).splitlines()

    assert [line.split()[0] for line in lines] == list(llm.stats())


def test_stats_count_programs_helpers_too(llm):
    stats = llm.stats()

    assert "count_tokens[256]" in stats.compile_seconds
    assert stats.num_programs == len(stats.compile_seconds) == stats.program_misses
    # One that JAX still has in memory is not looked for on the disk.
    assert 0 < stats.compile_cache_hits + stats.compile_cache_misses <= stats.num_programs
    assert all(seconds > 0 for seconds in stats.compile_seconds.values())


def test_a_second_model_finds_its_programs_on_the_disk(llm, checkpoints):
    with LLM(checkpoints(), **SMALL) as again:
        params = SamplingParams(temperature=0, max_tokens=3, repetition_penalty=1.5)
        again.generate([[1, 2, 3]], params, use_tqdm=False)
        stats = again.stats()

    assert stats.num_programs > 0
    assert stats.compile_cache_hits > 0
    assert stats.compile_cache_misses == 0


def test_report_has_what_is_needed_to_understand_a_run(llm):
    report = llm.report()
    text = repr(report)

    assert report.machine["devices"] == "1 x cpu"
    assert set(report.versions) == {"jax", "jaxlib", "python"}
    assert report.model["architecture"] == "LlamaForCausalLM"
    assert report.cache["pages"] == llm.stats().num_pages
    assert report.programs["compiled"] == llm.stats().num_programs
    assert report.seconds == llm.stats().compile_seconds
    for words in ("float32", "lazy", "jax_compilation_cache_dir", "set by", "count_tokens[256]"):
        assert words in text
    for part in ("machine", "versions", "model", "cache", "programs", "seconds", "settings"):
        assert f"\n{part}\n" in f"\n{text}\n"


def test_report_is_a_table_in_a_notebook(llm):
    shown = llm.report()._repr_html_()

    assert shown.startswith("<table>")
    assert '<tr><th colspan="2">settings</th></tr>' in shown
    assert "<td>LlamaForCausalLM</td>" in shown
    assert shown.count("<tr>") == sum(len(rows) + 1 for rows in llm.report().rows().values())


def test_report_escapes_names(llm, monkeypatch):
    monkeypatch.setattr(llm, "_name", "<b>bold</b>")

    assert "&lt;b&gt;bold" in llm.report()._repr_html_()

"""Imports run one way, and each outside library is known to few files."""

import ast
import functools
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import jaxllm

ROOT = Path(jaxllm.__file__).parent

LEVELS = [
    # A file may import from its own level and those above. A folder speaks for all its
    # files; where both a folder and a file in it are named, the file's own place counts.
    ["errors", "logs", "interrupts", "hlo", "traffic", "thunks", "flops"],
    ["compile_cache"],
    ["native"],
    ["keywords", "vllm_keywords", "config", "sampling_params", "pooling_params", "outputs"],
    ["prompts", "generation_defaults", "logit_rules", "text_stream", "truncation", "chat"],
    [
        "modeling.config",
        "devices",
        "distributed",
        "peers",
        "sharding",
        "pallas_kernels",
        "tokenizer",
        "hub",
    ],
    ["program_report", "machine", "hardware"],
    ["scoring"],
    ["sequence", "flags", "stopping", "inputs", "buckets", "cache", "progress", "settings"],
    ["modeling", "scheduler", "batch", "sampler", "request_builder", "results"],
    ["programs", "program_cache", "warm_up", "runner", "demo", "support", "roofline"],
    [
        "engine",
        "replicas",
        "huge_pages",
        "loading",
        "saving",
        "layout_report",
        "inspection",
        "planner",
        "compiling",
        "plan",
    ],
    ["stats", "report"],
    ["llm"],
    ["terminal_chat", "bench"],
    ["measuring"],
    ["", "sweep", "sweep_plot", "readme"],
    ["cli"],
    ["__main__"],
]
"""Modules below `jaxllm`, the first level knowing nobody; "" is `jaxllm` itself."""

HOST_FILES = [
    "batch",
    "bench.command",
    "bench.counts",
    "bench.latency",
    "bench.report",
    "bench.shapes",
    "bench.startup",
    "bench.startup_child",
    "bench.summary",
    "bench.throughput",
    "bench.trace",
    "bench.workload",
    "buckets",
    "cache.memory",
    "cache.page_pool",
    "cache.prefix_cache",
    "cache.spec",
    "chat",
    "config",
    "errors",
    "flags",
    "flops",
    "generation_defaults",
    "hlo",
    "interrupts",
    "keywords",
    "logit_rules",
    "logs",
    "modeling.config",
    "outputs",
    "progress",
    "prompts",
    "request_builder",
    "results",
    "sampling_params",
    "scheduler",
    "scoring",
    "sequence",
    "stopping",
    "sweep_plot",
    "text_stream",
    "thunks",
    "traffic",
    "vllm_keywords",
]
"""Files that hold no arrays of a device."""

OWNERS = {
    "transformers": ["tokenizer", "hub", "modeling.registry", "modeling.families", "demo"],
    "tokenizers": ["tokenizer", "demo"],
    "huggingface_hub": ["hub"],
    "safetensors": ["modeling.weights", "demo"],
    "orbax": ["modeling.checkpoint"],
    "optax": ["demo"],
    "torch": [],
    "ray": [],
}
"""Which files may import a library."""


@dataclass(frozen=True)
class Import:
    """One name that a file imports."""

    name: str
    line: int
    for_types: bool
    """Whether it is under `if TYPE_CHECKING`, and so never runs."""


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def for_types_only(tree):
    """The statements under `if TYPE_CHECKING`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    return found


@functools.cache
def imports_of(module):
    """Everything a file imports, at its top or inside a function."""
    tree = ast.parse(FILES[module].read_text())
    typed = for_types_only(tree)
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [Import(name, node.lineno, id(node) in typed) for name in names]
    return found


def own(name):
    """The module of ours that an imported name is or lies in; None for an outside library."""
    if name.split(".")[0] != "jaxllm":
        return None
    inner = name.removeprefix("jaxllm").removeprefix(".")
    return inner if inner in FILES else inner.rpartition(".")[0]


def is_within(module, folder):
    return module == folder or module.startswith(f"{folder}.")


def level_of(module):
    """The level of the longest name in `LEVELS` that holds the module; None if there is none."""
    places = [
        (len(name), level)
        for level, names in enumerate(LEVELS)
        for name in names
        if (is_within(module, name) if name else module == "")
    ]
    return max(places)[1] if places else None


def outside(module):
    """The outside libraries that a file imports."""
    return {i.name.split(".")[0] for i in imports_of(module)}


@pytest.mark.parametrize("module", FILES)
def test_every_file_has_a_level(module):
    assert level_of(module) is not None, f"{FILES[module]} is not in LEVELS: where does it belong?"


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    ours = [(i, own(i.name)) for i in imports_of(module) if own(i.name) in FILES]

    level = level_of(module)
    wrong = [f"line {i.line}: {i.name}" for i, source in ours if level_of(source) > level]
    assert wrong == []


def test_no_file_imports_itself_by_a_detour():
    graph = {
        module: {own(i.name) for i in imports_of(module) if not i.for_types} - {None, module}
        for module in FILES
    }

    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")


def test_imports_name_modules_that_exist():
    named = {own(i.name) for module in FILES for i in imports_of(module)} - {None}

    assert named <= set(FILES)


@pytest.mark.parametrize("module", HOST_FILES)
def test_host_files_import_no_jax(module):
    assert not outside(module) & {"jax", "jaxlib", "flax", "ml_dtypes"}


@pytest.mark.parametrize("module", ["scheduler", "sequence", "buckets", "cache.page_pool"])
def test_what_plans_holds_no_arrays_at_all(module):
    assert "numpy" not in outside(module)


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_only_by_its_owners(library):
    users = [module for module in FILES if library in outside(module)]

    strangers = [m for m in users if not any(is_within(m, owner) for owner in OWNERS[library])]
    assert strangers == []


def test_only_the_families_folder_knows_single_families():
    users = {m for m in FILES for i in imports_of(m) if "jaxllm.modeling.families." in i.name}

    assert {m for m in users if not is_within(m, "modeling.families")} <= {"demo.train"}


def test_nothing_in_the_library_needs_the_demo_or_the_tests():
    users = {
        module
        for module in FILES
        for i in imports_of(module)
        if i.name.startswith(("jaxllm.demo", "tests"))
    }

    assert all(is_within(module, "demo") for module in users)

import contextlib
import shutil
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

import jaxllm
from jaxllm import LLM, hub
from jaxllm.errors import CheckpointError
from jaxllm.hub import local_folder
from tests.tiny import tiny_checkpoint

MAIN, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch, checkpoints):
    """A hub cache as downloads leave it: `org/tiny` at `main`, and at the branch `wide`.

    The branch has another length, so that the two can be told apart.
    """
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    wide = tiny_checkpoint(tmp_path / "wide", max_position_embeddings=64)
    for branch, commit, source in (("main", MAIN, checkpoints()), ("wide", OTHER, wide)):
        add_to_cache(folder / "models--org--tiny", branch, commit, source)
    return folder


def add_to_cache(repo, branch, commit, source):
    """Lays files out as blobs, with a snapshot of links to them and a branch on top."""
    snapshot = repo / "snapshots" / commit
    for new in (repo / "refs", repo / "blobs", snapshot):
        new.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    for i, file in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{commit[:4]}{i:060x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


# ---------------------------------------------------------------- folders


def test_folder_is_taken_as_it_is(checkpoints):
    folder = checkpoints()

    assert local_folder(folder, None, None) == folder
    assert local_folder(str(folder), None, None) == folder


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert local_folder("~/models/tiny", None, None) == tmp_path / "models" / "tiny"


def test_demo_is_the_model_of_the_package():
    folder = local_folder("demo", None, None)

    assert folder.parent == Path(jaxllm.__file__).parent / "demo"


@pytest.mark.parametrize("name", ["/no/such/folder", "./no", "../no/such", "~/no/such", "a/b/c"])
def test_missing_folder_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)

    message = f"Invalid repository ID or local directory specified: '{name}' does not exist"
    with pytest.raises(CheckpointError, match=message):
        local_folder(name, None, None)


def test_file_in_place_of_a_folder_is_refused(checkpoints):
    file = checkpoints() / "model.safetensors"

    with pytest.raises(CheckpointError, match=r"'.*model\.safetensors' is a file\. Give a folder"):
        local_folder(file, None, None)


def test_unknown_home_is_refused():
    with pytest.raises(CheckpointError, match="'~no-such-user/model' does not exist"):
        local_folder("~no-such-user/model", None, None)


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize("name", ["org/absent", "absent"])
def test_hub_id_offline_names_the_setting(cache, name):
    with pytest.raises(CheckpointError, match=f"(?s)'{name}' is not in the local.*HF_HUB_OFFLINE"):
        local_folder(name, None, None)


def test_revision_that_is_not_cached_names_the_setting(cache):
    with pytest.raises(CheckpointError, match=r"(?s)'org/tiny' is not in the local.*HF_HUB"):
        local_folder("org/tiny", "absent", None)


@pytest.mark.parametrize("name", ["org/my model", "-tiny", "org/tiny.", "org/ti--ny", "a" * 97])
def test_bad_hub_id_is_refused_with_the_reason(name):
    message = f"(?s)Invalid repository ID .* specified: '{name}' .*spelling.*The hub says: "
    with pytest.raises(CheckpointError, match=message):
        local_folder(name, None, None)


def refusal(kind, status):
    # The hub's HTTP library differs between its versions; its errors ask for no more than this.
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the reason", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: refusal(GatedRepoError, 403), "Access to 'org/tiny' is restricted.*hf auth login"),
        (lambda: refusal(RepositoryNotFoundError, 404), r"\(revision 'main'\).*hf_token="),
        (lambda: refusal(RevisionNotFoundError, 404), "Check the spelling.*the reason"),
        (lambda: ConnectionError("no route"), "the hub cannot be reached: no route"),
    ],
)
def test_refusal_of_the_hub_is_explained_and_chained(monkeypatch, error, message):
    stated = error()

    def refuse(*_, **__):
        raise stated

    monkeypatch.setattr(hub, "snapshot_download", refuse)

    with pytest.raises(CheckpointError, match=message) as caught:
        local_folder("org/tiny", None, None)
    assert caught.value.__cause__ is stated


def test_hub_is_asked_with_revision_and_token(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)

    assert local_folder("org/tiny", "v1", "secret") == tmp_path
    assert (asked["name"], asked["revision"], asked["token"]) == ("org/tiny", "v1", "secret")


def test_only_what_a_model_needs_is_downloaded():
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "model.pt", "modeling_own.py", "README.md", "model.gguf"]
    unwanted += ["consolidated.safetensors", "original/params.json", "original/tokenizer.model"]
    unwanted += ["onnx/config.json", "sub/onnx/config.json", "openvino/config.json"]

    kept = filter_repo_objects(
        [*wanted, *unwanted], allow_patterns=hub.PATTERNS, ignore_patterns=hub.IGNORED
    )

    assert list(kept) == wanted


@pytest.mark.parametrize(
    ("options", "asked"),
    [({}, "*.safetensors"), ({"load_format": "dummy"}, None), ({"tokenizer": "org/words"}, None)],
)
def test_weights_are_downloaded_where_they_are_read(monkeypatch, checkpoints, options, asked):
    patterns = {}

    def download(name, *, allow_patterns, **_):
        patterns[name] = allow_patterns
        return str(checkpoints())

    monkeypatch.setattr(hub, "snapshot_download", download)
    tokenizer = {} if "tokenizer" in options else {"skip_tokenizer_init": True}
    with contextlib.suppress(CheckpointError):  # the tiny checkpoint has no tokenizer
        LLM("org/tiny", use_tqdm_on_load=False, **options, **tokenizer).close()
    name = "org/words" if "tokenizer" in options else "org/tiny"

    assert ("*.safetensors" in patterns[name]) == (asked is not None)


def test_cached_model_is_found_offline_by_branch_and_by_commit(cache):
    snapshots = cache / "models--org--tiny" / "snapshots"

    assert local_folder("org/tiny", None, None) == snapshots / MAIN
    assert local_folder("org/tiny", "main", None) == snapshots / MAIN
    assert local_folder("org/tiny", "wide", None) == snapshots / OTHER
    assert local_folder("org/tiny", OTHER, None) == snapshots / OTHER


def build(model, **options):
    return LLM(model, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20, **options)


def test_model_of_the_hub_is_loaded_as_its_folder_is(cache, checkpoints):
    with build("org/tiny") as llm, build(checkpoints()) as local:
        assert llm.max_model_len == local.max_model_len == 128
        assert "org/tiny" in repr(llm)
        for ours, theirs in zip(*(x._engine.runner.params for x in (llm, local)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_revision_chooses_the_model(cache):
    with build("org/tiny", revision="wide") as llm:
        assert llm.max_model_len == 64


def test_tokenizer_has_its_own_name_and_revision(cache):
    with pytest.raises(CheckpointError, match=f"snapshots/{OTHER}' has no tokenizer"):
        LLM("org/tiny", tokenizer="org/tiny", tokenizer_revision="wide")

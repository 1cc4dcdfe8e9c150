"""Models of the hub, from a cache folder laid out as the hub lays it out: no network is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from kvsharer_exp.model.availability import download_of, in_hub_cache, is_hub_id
from kvsharer_exp.model.describe import describe
from kvsharer_exp.model.load import load, load_model
from kvsharer_exp.model.spec import ModelSpec, hub_id, is_local, model_id
from kvsharer_exp.values.errors import InputError
from tests.model.test_internlm2 import written

NAME, COMMIT, OTHER = "org/tiny", "a" * 40, "b" * 40
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that cannot be reached, and a working folder of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path / "kvsharer"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def snapshot(hub: Path, name: str, commit: str, revision: str = "main") -> Path:
    """The folder of one commit, to which ``revision`` points."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    path = folder / "snapshots" / commit
    path.mkdir(parents=True)
    return path


def save_tiny(folder: Path, seed: int = 0) -> Any:
    model, tokenizer = load_model("tiny", seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def fingerprint(source: str, **options: Any) -> str:
    spec = ModelSpec(name="m", source=source, **options)
    return describe(load(spec)[0], spec)["fingerprint"]


def test_a_fingerprint_is_that_of_the_commit(hub: Path) -> None:
    """No transformers of today keeps the commit, and so nothing at all was hashed."""
    save_tiny(snapshot(hub, NAME, COMMIT))
    save_tiny(snapshot(hub, NAME, OTHER, "v2"), seed=1)
    assert fingerprint(NAME) == fingerprint(f"hub:{NAME}") == COMMIT[:12]
    assert fingerprint(NAME, revision="v2") == OTHER[:12]
    assert fingerprint(NAME, revision=OTHER) == OTHER[:12]


def test_a_fingerprint_of_a_converted_model_is_that_of_the_commit(hub: Path) -> None:
    """InternLM2 is loaded from the folder it was converted to, which has no commit."""
    name = "internlm/internlm2-1_8b"
    for commit, revision in ((COMMIT, "main"), (OTHER, "v2")):
        path = snapshot(hub, name, commit, revision)
        written(path)
        load_model("tiny")[1].save_pretrained(path)
    assert fingerprint(name) == COMMIT[:12]
    assert fingerprint(name, revision="v2") == OTHER[:12]


def test_a_fingerprint_never_hashes_nothing(hub: Path) -> None:
    """Where neither file nor commit is there, the weights in memory are told apart."""
    spec = ModelSpec(name="m", source="org/elsewhere")
    prints = [describe(load_model("tiny", seed=s)[0], spec)["fingerprint"] for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert "e3b0c44298fc" not in prints  # the SHA-256 of nothing


def test_hub_in_front_forces_the_hub(hub: Path) -> None:
    """A folder of the same name was taken instead."""
    path = snapshot(hub, NAME, COMMIT)
    of_the_hub = save_tiny(path, seed=1)
    on_disk = save_tiny(Path(NAME))
    assert is_local(NAME) and not is_local(f"hub:{NAME}")
    assert (hub_id(NAME), hub_id(f"hub:{NAME}")) == (None, NAME)
    for source, model in ((NAME, on_disk), (f"hub:{NAME}", of_the_hub)):
        loaded, tokenizer = load(ModelSpec(name="m", source=source))
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert tokenizer.bos_token_id == 1
    assert fingerprint(f"hub:{NAME}") == COMMIT[:12] != fingerprint(NAME)
    ids = [model_id(ModelSpec(name="m", source=s)) for s in (NAME, f"hub:{NAME}")]
    assert ids == ["tiny", NAME]


def test_hub_in_front_is_no_file_whatever_it_ends_in(hub: Path) -> None:
    name = "org/model.gguf"
    model = save_tiny(snapshot(hub, name, COMMIT))
    loaded, _ = load(ModelSpec(name="m", source=f"hub:{name}"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert fingerprint(f"hub:{name}") == COMMIT[:12]
    with pytest.raises(InputError, match="no such file"):
        load(ModelSpec(name="m", source=name))


def test_hub_in_front_is_asked_for_and_downloaded_under_its_own_name(hub: Path) -> None:
    Path(NAME).mkdir(parents=True)
    assert not is_hub_id(NAME) and is_hub_id(f"hub:{NAME}")
    assert download_of(NAME) is None
    download = download_of(f"hub:{NAME}")
    assert download is not None and (download.name, download.place) == (NAME, "model hub")
    save_tiny(snapshot(hub, NAME, COMMIT))
    assert in_hub_cache(NAME)
    assert download_of(f"hub:{NAME}") is None


@pytest.mark.parametrize("source", ["hub:", "hub:/no/folder", "hub:a/b/c", "hub:wheel:smollm2"])
def test_hub_in_front_of_what_is_no_id_is_refused(hub: Path, source: str) -> None:
    with pytest.raises(InputError, match="is none of: hub id") as refused:
        load(ModelSpec(name="m", source=source))
    assert len(str(refused.value)) <= 200


def test_a_hub_model_that_is_not_there_is_refused_though_a_folder_is(hub: Path) -> None:
    save_tiny(Path(NAME))
    with pytest.raises(InputError, match="the model hub cannot be reached"):
        load(ModelSpec(name="m", source=f"hub:{NAME}"))

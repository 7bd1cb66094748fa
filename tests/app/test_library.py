"""Erasures on disk: whose they are, what of others' files is taken, what is handed out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import esd_fast
from esd_fast.app.library import DOWNLOADS, Library
from esd_fast.app.limits import Limits
from esd_fast.app.models_offered import OfferedModels


@pytest.fixture(scope="module")
def erased():
    return esd_fast.erase(None, "cat", iterations=2, num_inference_steps=2)


@pytest.fixture
def library(tmp_path):
    return library_at(tmp_path)


def library_at(folder, **settings):
    limits = Limits(uploads=2)
    return Library(folder / "erasures", OfferedModels(folder / "models"), limits, **settings)


def made(library, erasure, owner):
    folder = library.new_folder(("cat",), owner)
    erasure.save(folder)
    return folder


def test_each_browser_has_its_own(library, erased, tmp_path):
    mine, theirs = made(library, erased, "me"), made(library, erased, "you")
    assert [e.folder for e in library.entries("me")] == [mine]
    assert library.get(mine.name, "me").concept == "cat"
    # the owner of the machine put a run of `esd-fast train` there
    erased.save(tmp_path / "erasures" / "everybody's")
    assert len(library.entries("me")) == 2
    assert library.get("everybody's", "me").model == "embedded"
    for key in (theirs.name, "nothing", "", "..", f"../erasures/{mine.name}", str(mine), None):
        with pytest.raises(FileNotFoundError, match="there is no such erasure"):
            library.get(key, "me")
    assert len(library_at(tmp_path, shared=True).entries("third")) == 3


def test_what_is_being_made_is_not_listed(library):
    folder = library.new_folder(("cat",), "me")
    assert library.entries("me") == []
    with pytest.raises(FileNotFoundError):
        library.get(folder.name, "me")
    (folder / "esd-torn.safetensors").write_bytes(b"torn")
    assert library.entries("me") == []


def test_links_out_of_the_folder_lead_nowhere(library, erased, tmp_path):
    erased.save(tmp_path / "elsewhere" / "run")
    (tmp_path / "secret.txt").write_text("secret")
    (library.folder / "linked").symlink_to(tmp_path / "elsewhere" / "run")
    for name in ("report.html", "report.json", "manifest.json", "app.json", "exports"):
        link = made(library, erased, "me") / name
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "secret.txt")
    assert library.entries("me") == []
    plain = library.get(made(library, erased, "me").name, "me")
    (plain.folder / "exports").mkdir()
    (plain.folder / "exports" / "lora.safetensors").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(FileNotFoundError):
        library.download(plain, "lora")


def test_names_are_safe(library):
    folders = [library.new_folder((text,), "me") for text in ("AC/DC", "../..", "CON", "猫" * 200)]
    assert {f.parent for f in folders} == {library.folder}
    assert all(len(f.name.encode()) < 100 for f in folders)


def test_download_is_what_export_writes(library, erased, tmp_path):
    entry = library.get(made(library, erased, "me").name, "me")
    for format in DOWNLOADS:
        file, name = library.download(entry, format)
        assert name.endswith(".safetensors")
        assert entry.folder in file.parents
        if format == "delta":
            esd_fast.load(file).apply(model := pipeline())
            erased.apply(other := pipeline())
            assert same(model.unet, other.unet)
        else:
            told = erased.export(tmp_path / f"{format}.safetensors", format, model="embedded")
            assert same_tensors(load_file(file), load_file(told.path))
    with pytest.raises(ValueError, match="format is 'diffusers'"):
        library.download(entry, "diffusers")


def pipeline():
    from diffusers import StableDiffusionPipeline

    from esd_fast.demo import model_path

    return StableDiffusionPipeline.from_pretrained(model_path())


def same(one, other):
    return same_tensors(one.state_dict(), other.state_dict())


def same_tensors(one, other):
    return one.keys() == other.keys() and all(t.equal(other[n]) for n, t in one.items())


def test_import_takes_erasures_alone(library, erased, tmp_path):
    file = erased.save(tmp_path / "mine.safetensors")
    entry = library.bring(file, "mine.safetensors", "me")
    assert (entry.concept, entry.imported, entry.owner) == ("cat", True, "me")
    assert same_tensors(esd_fast.load(entry.folder).tensors, erased.tensors)
    library.bring(file, "mine.safetensors", "me")
    with pytest.raises(ValueError, match="2 erasures were imported already"):
        library.bring(file, "mine.safetensors", "me")
    library.bring(file, "mine.safetensors", "you")


NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no tensors"),
        ({"a.lora_A.weight": torch.zeros(2, 2)}, "it is a LoRA"),
        ({"mid_block.a.lora.down.weight": torch.zeros(2, 2)}, "it is a LoRA"),
        ({"model.diffusion_model.a": torch.zeros(2)}, "whole model"),
        ({"something": torch.zeros(2)}, "not those of a UNet"),
        ({NAME: torch.full((2, 2), torch.inf)}, "no finite number"),
        ({NAME: torch.zeros(2, 2, dtype=torch.int64)}, "no finite number"),
    ],
)
def test_other_files_are_refused(library, tmp_path, tensors, said):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=said):
        library.bring(tmp_path / "x.safetensors", "x.safetensors", "me")
    assert not list(library.folder.iterdir())


def test_damaged_and_pickled_files_are_refused(library, erased, tmp_path):
    whole = erased.save(tmp_path / "whole.safetensors").read_bytes()
    torn = tmp_path / "torn.safetensors"
    for content in (whole[:-10], whole[:4], b"", b"\xff" * 100, b"[" * 10_000):
        torn.write_bytes(content)
        with pytest.raises(ValueError, match="safetensors"):
            library.bring(torn, "torn.safetensors", "me")
    torch.save({NAME: torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must be a"):
        library.bring(tmp_path / "a.pt", "a.pt", "me")
    with pytest.raises(ValueError, match="safetensors"):
        library.bring(tmp_path / "a.pt", "a.safetensors", "me")  # called something that it is not
    assert not list(library.folder.iterdir())


def test_what_a_file_says_is_not_trusted(library, erased, tmp_path):
    """Its manifest may hold anything: it is cut, never a path, and never a model that is loaded."""
    told = {"concept": "x" * 5000 + "\n<b>", "model": "/etc/passwd", "method": "a" * 500}
    said = esd_fast.Erasure(erased.tensors, erased.manifest | told)
    file = said.save(tmp_path / "odd.safetensors")
    entry = library.bring(file, "odd.safetensors", "me")
    assert len(entry.concept) <= 200
    assert len(entry.method) <= 200
    assert entry.model == "passwd"
    with pytest.raises(ValueError, match="model is 'passwd'"):
        library.download(entry, "lora")
    for manifest in ("[]", "{", json.dumps({"concept": {"a": 1}})):
        save_file(dict(erased.tensors), file, metadata={"esd_fast_manifest": manifest})
        with pytest.raises(ValueError, match="damaged"):
            library.bring(file, "odd.safetensors", "me")

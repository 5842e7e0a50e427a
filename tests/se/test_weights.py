"""Untrusted weights: what upstream wrote loads, what is hostile or damaged is refused in one line and never runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.pickles import Pickled, pretend_module
from sest.errors import InputError
from sest.se.weights import find_encoder, load_encoder, save_safetensors_copy
from sest.untrusted.tensors import read_vectors

TOKEN_DIM, WIDTH, HIDDEN, OUT = 6, 8, 12, 5
CONFIG = "model:\n  nhead: 2\ndataset:\n  pad_length: 16\n  cls_token_idx: 1\n"


def encoder_tensors(n_layers: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a tiny SE model, written out from docs/design.md, values random."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, TOKEN_DIM), "dataset_token": (1, TOKEN_DIM)}
    shapes["bin_encoder.weight"] = (10, WIDTH)
    weights = {
        "encoder.0": (WIDTH, TOKEN_DIM),
        "encoder.1": (WIDTH,),
        "decoder.0.intermediate_dense": (2 * WIDTH, WIDTH),
        "decoder.0.dense": (WIDTH, 2 * WIDTH),
        "decoder.0.layer_norm": (WIDTH,),
        "decoder.1": (OUT, WIDTH),
        "count_encoder.0": (512, 1),
        "count_encoder.2": (10, 512),
        "dataset_embedder": (10, OUT),
    }
    for layer in (f"transformer_encoder.layers.{i}." for i in range(n_layers)):
        weights |= {layer + "qkv_proj": (3 * WIDTH, WIDTH), layer + "out_proj": (WIDTH, WIDTH)}
        weights |= {layer + "linear1": (HIDDEN, WIDTH), layer + "linear2": (WIDTH, HIDDEN)}
        weights |= {layer + "norm1": (WIDTH,), layer + "norm2": (WIDTH,)}
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gene_vectors() -> dict[str, torch.Tensor]:
    """Symbols in an order that is not the alphabet's: dict order is the token index."""
    return {name: torch.full((TOKEN_DIM,), float(i)) for i, name in enumerate(["TP53", "ACTB", "MYC"])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An SE folder with safetensors weights, genes and config.yaml."""
    save_file(encoder_tensors(), tmp_path / "model.safetensors")
    torch.save(gene_vectors(), tmp_path / "protein_embeddings.pt")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace (None: remove) tensors of the folder's weights; `__` in a name stands for a dot."""
    new = encoder_tensors() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in new.items() if tensor is not None}, folder / "model.safetensors")


# --- what upstream wrote ---------------------------------------------------------------------------------------------


def test_upstream_checkpoint_loads_with_its_own_sizes_settings_and_genes(
    shared_reference: Path, tmp_path: Path
) -> None:
    model = shared_reference / "se" / "log1p" / "model"
    (tmp_path / "se_epoch1.ckpt").symlink_to(model / "se_epoch1.ckpt")
    (tmp_path / "config.yaml").write_text(CONFIG)  # disagrees: the checkpoint wins
    encoder = load_encoder(tmp_path)
    assert (encoder.n_heads, encoder.pad_length, encoder.cls_count_gene) == (4, 128, 3)
    assert encoder.source == "se_epoch1.ckpt"
    assert encoder.tensors["encoder.0.weight"].shape == (64, 96)
    assert encoder.tensors["transformer_encoder.layers.2.qkv_proj.weight"].shape == (192, 64)
    assert encoder.tensors["decoder.1.weight"].shape == (32, 64)
    assert encoder.tensors["dataset_token"].shape == (1, 96)
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in encoder.tensors.values())
    names, vectors = read_vectors(model / "protein_embeddings.pt")  # upstream writes the same genes there
    assert encoder.genes == names == tuple(f"GENE{i}" for i in range(650))
    assert torch.equal(encoder.gene_vectors, vectors)


# --- hostile, damaged and mistaken files -----------------------------------------------------------------------------


def test_checkpoint_that_would_run_a_command_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    payload = Pickled(os.system, f"touch {tmp_path / 'ran'}")
    torch.save({"state_dict": encoder_tensors(), "hyper_parameters": payload}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"model\.ckpt was refused unread.*posix\.system"):
        load_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"", "is empty"),
    ],
)
def test_failed_downloads_are_told_for_what_they_are(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_encoder(tmp_path)


def test_truncated_safetensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load_encoder(folder)


# --- the encoder folder ----------------------------------------------------------------------------------------------


def test_safetensors_folder_loads_exactly_what_was_saved(folder: Path) -> None:
    encoder = load_encoder(folder)
    assert all(torch.equal(encoder.tensors[name], tensor) for name, tensor in encoder_tensors().items())
    assert (encoder.n_heads, encoder.pad_length, encoder.cls_count_gene) == (2, 16, 1)
    assert encoder.genes == ("TP53", "ACTB", "MYC")
    assert torch.equal(encoder.gene_vectors[:, 0], torch.tensor([0.0, 1.0, 2.0]))


def test_half_precision_weights_become_float32(folder: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in encoder_tensors().items()}, folder / "model.safetensors")
    encoder = load_encoder(folder)
    expected = encoder_tensors()["decoder.1.weight"].bfloat16().float()  # widening is exact
    assert torch.equal(encoder.tensors["decoder.1.weight"], expected)


def test_sha256_follows_every_content_that_embeddings_depend_on(folder: Path) -> None:
    first = load_encoder(folder).sha256
    assert load_encoder(folder / "model.safetensors").sha256 == first
    torch.save(dict(reversed(gene_vectors().items())), folder / "protein_embeddings.pt")
    reordered = load_encoder(folder).sha256
    (folder / "config.yaml").write_text(CONFIG.replace("16", "17"))
    longer = load_encoder(folder).sha256
    change(folder, cls_token=torch.zeros(1, TOKEN_DIM))
    assert len({first, reordered, longer, load_encoder(folder).sha256}) == 4


def test_several_checkpoints_need_a_name(folder: Path) -> None:
    (folder / "se_epoch4.ckpt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"model\.safetensors, se_epoch4\.ckpt.*--weights NAME"):
        find_encoder(folder)
    assert find_encoder(folder, "model.safetensors").weights == folder / "model.safetensors"
    with pytest.raises(InputError, match=r"Did you mean 'se_epoch4\.ckpt'"):
        find_encoder(folder, "se_epoch.ckpt")
    with pytest.raises(InputError, match="is one file"):
        find_encoder(folder / "model.safetensors", "se_epoch4.ckpt")


def test_missing_or_wrong_paths_say_what_an_se_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    torch.save(gene_vectors(), tmp_path / "ESM2_pert_features.pt")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "ESM2_pert_features.pt"):
        with pytest.raises(InputError, match="huggingface-cli download arcinstitute/SE-600M"):
            find_encoder(path)


def test_settings_or_genes_that_are_nowhere_are_asked_for(folder: Path) -> None:
    (folder / "config.yaml").write_text("model:\n  nhead: 2\n")
    with pytest.raises(InputError, match=r"does not say dataset\.pad_length"):
        load_encoder(folder)
    (folder / "config.yaml").write_text(CONFIG.replace("2", "${model.heads}"))
    with pytest.raises(InputError, match=r"model\.nhead is '\$\{model\.heads\}'"):
        load_encoder(folder)
    (folder / "config.yaml").write_text(CONFIG.replace("2", "3"))
    with pytest.raises(InputError, match=r"3 heads .* do not divide a width of 8"):
        load_encoder(folder)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"config\.yaml is not YAML"):
        load_encoder(folder)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "protein_embeddings.pt").unlink()
    with pytest.raises(InputError, match=r"No protein_embeddings\.pt beside"):
        load_encoder(folder)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    change(folder, decoder__1__weight=torch.zeros(OUT, WIDTH + 1))
    with pytest.raises(InputError, match=r"tensor decoder\.1\.weight has shape \(5, 9\)"):
        load_encoder(folder)
    change(folder, dataset_embedder__weight=torch.zeros(11, OUT), dataset_embedder__bias=torch.zeros(11))
    with pytest.raises(InputError, match=r"dataset_embedder\.weight has shape \(11, 5\)"):
        load_encoder(folder)
    change(folder, transformer_encoder__layers__0__norm1__bias=None)
    with pytest.raises(InputError, match=r"not a State Embedding checkpoint: no .*layers\.0\.norm1\.bias"):
        load_encoder(folder)
    change(folder, cls_token=torch.full((1, TOKEN_DIM), float("nan")))
    with pytest.raises(InputError, match="NaN or infinite numbers in cls_token"):
        load_encoder(folder)
    change(folder, gene_embedding_layer__0__bias=torch.full((WIDTH,), 7.0))  # upstream's two names of one layer
    with pytest.raises(InputError, match=r"gene_embedding_layer\.0\.bias and encoder\.0\.bias differ"):
        load_encoder(folder)
    change(folder)
    torch.save({"TP53": torch.zeros(TOKEN_DIM + 1)}, folder / "protein_embeddings.pt")
    with pytest.raises(InputError, match=r"have 7 numbers each, its encoder\.0\.weight takes 6"):
        load_encoder(folder)


def test_other_kinds_of_file_are_recognised(folder: Path) -> None:
    save_file({"project_out.0.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="looks like a `state tx`"):
        load_encoder(folder)
    save_file(gene_vectors(), folder / "model.safetensors")
    with pytest.raises(InputError, match="looks like a features file"):
        load_encoder(folder)


# --- the safetensors copy --------------------------------------------------------------------------------------------


def test_copy_of_a_checkpoint_is_bit_identical_and_used_only_while_its_source_is_unchanged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class DictConfig:
        def __init__(self, content: Any) -> None:
            self._content = content

    class AnyNode:
        def __init__(self, value: Any) -> None:
            self._val = value

    pretend_module(monkeypatch, "omegaconf.dictconfig", DictConfig)
    pretend_module(monkeypatch, "omegaconf.nodes", AnyNode)
    tensors = encoder_tensors()
    tensors["cls_token"] = tensors["cls_token"].half()  # stored types are kept
    tensors["gene_embedding_layer.0.weight"] = tensors["encoder.0.weight"]  # upstream stores these twice
    pickled = DictConfig({"dataset": DictConfig({"pad_length": AnyNode(32), "cls_token_idx": AnyNode(np.int64(2))})})
    source = folder / "se.ckpt"
    torch.save({"state_dict": tensors, "hyper_parameters": {"nhead": np.int64(4), "cfg": pickled}}, source)
    (folder / "model.safetensors").unlink()

    copy = save_safetensors_copy(source)
    assert copy == folder / "se.sest.safetensors"
    assert stat.S_IMODE(copy.stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "protein_embeddings.pt", "se.ckpt", "se.sest.safetensors",
    ]  # fmt: skip
    stored = load_file(copy)
    assert set(stored) == set(tensors)
    assert all(stored[n].dtype == t.dtype and torch.equal(stored[n], t) for n, t in tensors.items())
    with safe_open(copy, framework="pt") as file:
        assert list(file.metadata()) == ["sest"]

    assert find_encoder(folder).weights == find_encoder(source).weights == copy
    encoder = load_encoder(folder)  # the checkpoint's settings win over config.yaml, through the copy as well
    assert (encoder.n_heads, encoder.pad_length, encoder.cls_count_gene) == (4, 32, 2)
    assert encoder.source == "se.ckpt"
    source.write_bytes(source.read_bytes()[:-1] + b"\1")  # as long as before
    assert find_encoder(folder).weights == source
    assert "se.sest.safetensors is ignored" in caplog.text


def test_only_a_ckpt_can_be_copied(folder: Path) -> None:
    with pytest.raises(InputError, match=r"not a \.ckpt file"):
        save_safetensors_copy(folder / "model.safetensors")

"""Untrusted weights: what upstream wrote loads, what is hostile or damaged is refused in one line and never runs."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sest.errors import InputError
from sest.unpickle import StandIn, allowed_in_checkpoint, allowed_in_dictionary, read_dictionary, read_pickle
from sest.weights import find_encoder, load_encoder, load_features, load_transition, save_safetensors_copy

TOKEN_DIM, WIDTH, HIDDEN, OUT = 6, 8, 12, 5
CONFIG = "model:\n  nhead: 2\ndataset:\n  pad_length: 16\n  cls_token_idx: 1\n"


def encoder_tensors(n_layers: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a tiny SE model, written out from DESIGN section 4, values random."""
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


class Pickled:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def pretend_module(monkeypatch: pytest.MonkeyPatch, name: str, *members: Any) -> None:
    """Make `members` importable from a module `name`, as they were where the checkpoint was saved."""
    monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
    module = types.ModuleType(name)
    for member in members:
        member.__module__ = name
        member.__qualname__ = member.__name__
        setattr(module, member.__name__, member)
    monkeypatch.setitem(sys.modules, name, module)


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
    beside = load_features(model / "protein_embeddings.pt")  # upstream writes the same genes there
    assert encoder.genes == tuple(beside) == tuple(f"GENE{i}" for i in range(650))
    np.testing.assert_array_equal(encoder.gene_vectors.numpy(), np.stack(list(beside.values())))


def test_upstream_transition_checkpoint_gives_its_tensors_and_plain_hyper_parameters(shared_reference: Path) -> None:
    read = load_transition(shared_reference / "st" / "st.ckpt")
    expected = load_file(shared_reference / "st" / "state.safetensors")
    assert set(expected) <= set(read.tensors)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in expected.items())
    assert read.hyper_parameters["hidden_dim"] == 48
    assert read.hyper_parameters["transformer_backbone_kwargs"]["num_hidden_layers"] == 2
    assert read.hyper_parameters["loss_fn"] == "MSELoss"  # an object: only its class name survives
    assert read.step == 0


# --- hostile pickles -------------------------------------------------------------------------------------------------


def test_checkpoint_that_would_run_a_command_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    payload = Pickled(os.system, f"touch {tmp_path / 'ran'}")
    torch.save({"state_dict": encoder_tensors(), "hyper_parameters": payload}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"model\.ckpt was refused unread.*posix\.system"):
        load_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("allowed", [allowed_in_checkpoint, allowed_in_dictionary])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, r"builtins\.eval"),
        (exec, r"builtins\.exec"),
        (getattr, r"builtins\.getattr"),
        (__import__, r"builtins\.__import__"),
        (shutil.rmtree, r"shutil\.rmtree"),
        (torch.hub.load, r"torch\.hub\.load"),
    ],
)
def test_functions_off_the_short_list_are_refused_by_name(
    function: Callable[..., Any], name: str, allowed: Callable[[str], bool], tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(2), "b": Pickled(function, f"open({str(tmp_path / 'ran')!r}, 'w')")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=name):
        read_pickle(tmp_path / "x.pt", allowed)
    assert not (tmp_path / "ran").exists()


def test_listed_packages_are_never_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(path: str) -> None:
        Path(path).touch()

    pretend_module(monkeypatch, "state.trap", run)  # importable: only the stand-in keeps it from running
    torch.save({"x": Pickled(run, str(tmp_path / "ran"))}, tmp_path / "x.ckpt")
    content = read_pickle(tmp_path / "x.ckpt", allowed_in_checkpoint)
    assert isinstance(content["x"], StandIn) and content["x"].args == (str(tmp_path / "ran"),)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match=r"state\.trap\.run"):
        read_pickle(tmp_path / "x.ckpt", allowed_in_dictionary)


def test_reading_leaves_no_safe_globals_behind(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({np.str_("A"): torch.ones(2)}, tmp_path / "x.pt")
    assert list(load_features(tmp_path / "x.pt")) == ["A"]
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_crash_of_the_reading_process_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho giving up >&2\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"its reader ended with -11 \(giving up\)"):
        load_encoder(tmp_path)


# --- damaged and mistaken files --------------------------------------------------------------------------------------


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


def test_damaged_pickles_are_one_line_errors(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    torch.save(gene_vectors(), whole)
    part.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        load_features(part)
    part.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InputError, match=r"bare pickle or was saved by PyTorch before 1\.6"):
        load_features(part)
    part.write_bytes(b"not a checkpoint at all")
    with pytest.raises(InputError, match="not a PyTorch file"):
        load_features(part)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb: torch.save never compresses
        archive.writestr("part/data.pkl", bytes(10_000_000))
    with pytest.raises(InputError, match="unpacks to more than its size"):
        load_features(part)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    torch.save({np.str_("A"): np.arange(3.0), "B": torch.ones(3)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    rng = np.random.default_rng([0])
    refused = 0
    for _ in range(150):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # checksums fit: only the pickle itself is wrong
            for name, data in members.items():
                damaged = bytearray(data)
                if name.endswith("data.pkl"):
                    damaged[rng.integers(len(data))] = rng.integers(256)
                archive.writestr(name, bytes(damaged))
        try:
            read_dictionary(tmp_path / "x.pt")
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 75  # most bytes of a pickle matter


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
    with pytest.raises(InputError, match=r"model\.safetensors, se_epoch4\.ckpt.*--checkpoint NAME"):
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


# --- features --------------------------------------------------------------------------------------------------------


def test_features_in_three_formats_are_the_same_float32_vectors(tmp_path: Path) -> None:
    vectors: dict[str, Any] = {
        name: np.arange(4) + i + 0.5 for i, name in enumerate(["TP53", "non-targeting"])
    }  # float64
    torch.save({name: torch.from_numpy(v) for name, v in vectors.items()}, tmp_path / "a.pt")
    torch.save({np.str_(name): v.astype(np.float32) for name, v in vectors.items()}, tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", **vectors)
    save_file({name: torch.from_numpy(v).half() for name, v in vectors.items()}, tmp_path / "d.safetensors")
    for path in tmp_path.iterdir():
        read = load_features(path)
        assert set(read) == set(vectors)
        assert all(type(name) is str for name in read)
        for name, vector in read.items():
            assert vector.dtype == np.float32 and vector.shape == (4,)
            np.testing.assert_array_equal(vector, vectors[name])  # exact: halves of small integers fit float16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"A": np.zeros(3), "B": np.zeros(4)}, r"a vector of 3 numbers. Not so: B \(\(4,\)\)"),
        ({"A": np.zeros((2, 3))}, r"A \(\(2, 3\)\)"),
        ({"A": np.array(["x", "y"])}, r"A \(not numbers\)"),
        ({"A": np.array([1.0, np.inf]), "B": np.zeros(2)}, "infinite numbers in A"),
        ({"A": np.array([1e300])}, "infinite numbers in A"),  # does not fit float32
        ({"A": np.array([{}], dtype=object)}, "cannot be read"),
        ({}, "holds no vectors"),
    ],
)
def test_features_that_are_not_equal_finite_vectors_are_named(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=message):
        load_features(tmp_path / "x.npz")


def test_pt_files_that_are_no_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.ones(2)], path)
    with pytest.raises(InputError, match="holds a list, not a dict"):
        load_features(path)
    torch.save({1: torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"names must be text. Not so: 1 \(int\)"):
        load_features(path)
    torch.save({"A": torch.ones(2), np.str_("A\0"): torch.ones(2)}, path)
    with pytest.raises(InputError, match="the same name twice"):
        load_features(path)
    with pytest.raises(InputError, match="No file at"):
        load_features(tmp_path / "gone.pt")
    with pytest.raises(InputError, match=r"\.pt, \.npz or \.safetensors"):
        load_features(Path(__file__))

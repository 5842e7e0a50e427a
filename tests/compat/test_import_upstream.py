"""Upstream's `state tx` checkpoint (shared/reference/st) as one of ours: the same numbers, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from helpers.caches import small_screen, write_cache
from helpers.notes import Notes
from sest.compat import import_upstream
from sest.compat.import_upstream import TransitionCheckpoint, import_checkpoint, load_transition
from sest.config import PredictConfig
from sest.describe import describe
from sest.errors import InputError
from sest.head.loss import energy_distance
from sest.prediction.predict import predict
from sest.progress import reporting
from sest.runs.checkpoint import load_model, open_checkpoint
from sest.runs.known import known_without_cells


@pytest.fixture(scope="module")
def read(shared_reference: Path) -> TransitionCheckpoint:
    """The reference checkpoint as the package reads it, in a process of its own: once, as that takes seconds."""
    return load_transition(shared_reference / "st" / "st.ckpt")


@pytest.fixture(scope="module")
def imported(shared_reference: Path, read: TransitionCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "st"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_upstream, "load_transition", lambda source: read)
        import_checkpoint(shared_reference / "st" / "st.ckpt", folder)
    return folder


@pytest.fixture
def changed(read: TransitionCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The error for the reference checkpoint with other hyper-parameters, backbone settings or tensors."""

    def call(tmp_path: Path, backbone: dict[str, Any] | None = None, tensors: Any = None, **parameters: Any) -> str:
        kwargs = {**read.hyper_parameters["transformer_backbone_kwargs"], **(backbone or {})}
        other = {**read.hyper_parameters, "transformer_backbone_kwargs": kwargs, **parameters}
        made = TransitionCheckpoint((tensors or dict)(read.tensors), other, 5)
        monkeypatch.setattr(import_upstream, "load_transition", lambda source: made)
        with pytest.raises(InputError) as refused:
            import_checkpoint(Path("up.ckpt"), tmp_path / "out")
        assert not list(tmp_path.iterdir()) and "\n" not in str(refused.value)
        return str(refused.value)

    return call


def test_upstream_transition_checkpoint_gives_its_tensors_and_plain_hyper_parameters(
    read: TransitionCheckpoint, shared_reference: Path
) -> None:
    expected = load_file(shared_reference / "st" / "state.safetensors")
    assert set(expected) <= set(read.tensors)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in expected.items())
    assert read.hyper_parameters["hidden_dim"] == 48
    assert read.hyper_parameters["transformer_backbone_kwargs"]["num_hidden_layers"] == 2
    assert read.hyper_parameters["loss_fn"] == "MSELoss"  # an object: only its class name survives
    assert read.step == 0


def test_an_imported_head_predicts_what_upstream_predicted(imported: Path, shared_reference: Path) -> None:
    """float32 in another order of operations: 1e-6 for values near 1."""
    reference = np.load(shared_reference / "st" / "reference.npz")
    with torch.no_grad():
        predicted = load_model(imported)(torch.from_numpy(reference["basal"]), torch.from_numpy(reference["pert"]))
    np.testing.assert_allclose(predicted.numpy(), reference["pred"], atol=1e-6)


def test_its_loss_and_every_gradient_are_upstreams(imported: Path, shared_reference: Path) -> None:
    reference = np.load(shared_reference / "st" / "reference.npz")
    model = load_model(imported)
    predicted = model(torch.from_numpy(reference["basal"]), torch.from_numpy(reference["pert"]))
    losses = energy_distance(predicted, torch.from_numpy(reference["target"]))
    np.testing.assert_allclose(losses.detach().numpy(), reference["per_set_loss"], rtol=1e-4)  # geomloss's own noise
    losses.mean().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    expected = {key.removeprefix("grad/"): reference[key] for key in reference.files if key.startswith("grad/")}
    assert set(expected) - set(gradients) <= {import_upstream.FROZEN} and len(gradients) == len(model.state_dict())
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * scale, err_msg=name)  # float32 sums


def test_the_new_checkpoint_says_what_it_is(imported: Path, shared_reference: Path) -> None:
    sizes = json.loads((shared_reference / "st" / "config.json").read_text())
    facts, damaged = describe(imported, verify=True)
    assert facts["kind"] == "checkpoint" and facts["verified"] and not damaged
    assert (facts["dim"], facts["n_genes"], facts["n_features"]) == (sizes["dim"], sizes["genes"], sizes["pert_dim"])
    assert (facts["n_layers"], facts["n_heads"], facts["hidden"]) == (sizes["layers"], sizes["heads"], sizes["hidden"])
    model = load_model(imported)
    assert facts["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    state = open_checkpoint(imported).state
    assert state["config"]["set_size"] == sizes["set_size"] and state["imported"]["file"] == "st.ckpt"
    assert not {"best_step", "val_loss"} & {key for key, value in facts.items() if value is not None}


def test_importing_again_gives_the_same_bytes(
    imported: Path, read: TransitionCheckpoint, shared_reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reversed_order = TransitionCheckpoint(dict(reversed(read.tensors.items())), read.hyper_parameters, read.step)
    monkeypatch.setattr(import_upstream, "load_transition", lambda source: reversed_order)
    import_checkpoint(shared_reference / "st" / "st.ckpt", tmp_path / "again")
    for file in imported.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_older_checkpoint_is_replaced_only_when_that_is_asked_for_and_nothing_else_is(
    imported: Path, shared_reference: Path, tmp_path: Path
) -> None:
    source, out = shared_reference / "st" / "st.ckpt", tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("older")
    with pytest.raises(InputError, match=r"not an empty folder\. Pass --force"):
        import_checkpoint(source, out)
    import_checkpoint(source, out, force=True)
    assert (out / "model.safetensors").read_bytes() == (imported / "model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match=r"holds notes\.txt, which is never replaced"):
            import_checkpoint(source, out, force=force)
    assert (out / "notes.txt").read_text() == "mine"


def test_files_that_are_no_state_tx_checkpoint_say_what_they_are(shared_reference: Path, tmp_path: Path) -> None:
    encoder = shared_reference / "se" / "raw" / "model" / "se_epoch1.ckpt"
    with pytest.raises(InputError, match="looks like a State Embedding encoder: pass it to --encoder"):
        import_checkpoint(encoder, tmp_path / "out")
    (tmp_path / "x.ckpt").write_text("no zip")
    with pytest.raises(InputError, match=r"x\.ckpt"):
        import_checkpoint(tmp_path / "x.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"transformer_backbone_key": "GPT2"}, "transformer_backbone_key=GPT2"),
        ({"predict_residual": False}, "predict_residual=False"),
        ({"mask_attn": True}, "mask_attn=True"),
        ({"activation": "relu"}, "activation=relu"),
        ({"output_space": "all"}, "output_space=all"),
        ({"backbone": {"bidirectional_attention": False}}, "bidirectional_attention=False"),
        ({"backbone": {"rms_norm_eps": 1e-5}}, "rms_norm_eps=1e-05"),
        ({"backbone": {"num_key_value_heads": 2}}, "num_key_value_heads=2"),
        ({"backbone": {"hidden_act": "gelu"}}, "hidden_act=gelu"),
        ({"transformer_backbone_kwargs": "DictConfig"}, "bidirectional_attention=False"),
    ],
)
def test_another_architecture_is_refused_by_name(
    changed: Callable[..., str], tmp_path: Path, parameters: dict[str, Any], named: str
) -> None:
    line = changed(tmp_path, **parameters)
    assert "another architecture" in line and named in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {**t, "gene_decoder.decoder.0.weight": torch.zeros(2, 2)}, "besides gene_decoder.decoder.0.weight"),
        (lambda t: {n: x for n, x in t.items() if n != "project_out.9.bias"}, "lacks project_out.9.bias"),
        (lambda t: {n: x for n, x in t.items() if n != "basal_encoder.0.weight"}, "no basal_encoder.0.weight"),
        (lambda t: {n: x for n, x in t.items() if not n.startswith("project_out")}, "no project_out.0.weight"),
        (
            lambda t: {**t, "basal_encoder.3.bias": torch.zeros(7)},
            "other shapes than sest's head: basal_encoder.3.bias",
        ),
    ],
)
def test_tensors_that_are_not_of_our_head_are_named(
    changed: Callable[..., str], tmp_path: Path, change: Callable[[Any], Any], named: str
) -> None:
    assert named in changed(tmp_path, tensors=change)


def test_unusable_numbers_in_the_checkpoint_are_refused(changed: Callable[..., str], tmp_path: Path) -> None:
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5}
    assert "5 heads of width 48" in changed(tmp_path, backbone=heads)
    assert "dropout None" in changed(tmp_path, dropout=None)


def test_what_upstream_keeps_besides_does_not_hinder(
    read: TransitionCheckpoint, shared_reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's trainer always passes the number of batches, and names the genes where it knows them."""
    genes = [f"g{i}" for i in range(60)]
    more = {**read.hyper_parameters, "batch_dim": 12, "gene_names": genes, "embed_key": "X_state"}
    made = TransitionCheckpoint(read.tensors, more, 7)
    monkeypatch.setattr(import_upstream, "load_transition", lambda source: made)
    state = import_checkpoint(shared_reference / "st" / "st.ckpt", tmp_path / "out")
    assert state["genes"] == genes and state["encoder"]["name"] == "obsm:X_state" and state["step"] == 7


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with embeddings of width 20 and 60 genes, as the reference's head takes them, and features beside it."""
    group = small_screen(dim=20, genes=[f"g{i}" for i in range(60)], n_controls=11)
    rng = np.random.default_rng(0)
    save_file({n: rng.normal(size=24).astype(np.float32) for n in ("P", "Q", "NEW")}, tmp_path / "f.safetensors")
    return write_cache(tmp_path / "cache.zarr", [group])


def test_an_imported_checkpoint_predicts_with_a_cache_and_features(imported: Path, cache: Path, tmp_path: Path) -> None:
    """Of the cache's five perturbations the features file has two: only those that are asked for count."""
    out, notes = tmp_path / "out.h5ad", Notes()
    files: dict[str, Any] = {"cache": str(cache), "perturbations": str(tmp_path / "f.safetensors")}
    with reporting(notes):
        predict(imported, out, PredictConfig(**files, only="NEW,P", n_cells=20, cell_type="x"))
    cells = ad.read_h5ad(out)
    assert dict(cells.obs["gene"].value_counts()) == {"NEW": 20, "P": 20, "ctrl": 11}
    assert list(cells.var_names) == [f"g{i}" for i in range(60)]
    assert "baselines" not in cells.uns["sest"]
    assert any("does not name its genes" in note for note in notes.notes)
    out = tmp_path / "other.h5ad"
    with pytest.raises(InputError, match="no features for 1 of 1 perturbations: R"):
        predict(imported, out, PredictConfig(**files, only="R", cell_type="x"))
    with pytest.raises(InputError, match="Pass --perturbations"):
        predict(imported, out, PredictConfig(cache=str(cache)))
    with pytest.raises(InputError, match="does not say which encoder"):
        predict(imported, out, PredictConfig(**files, only="P", controls="new.h5ad"))


def test_a_cache_or_features_of_other_sizes_are_refused(
    imported: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, Any] = {"cache": str(cache), "perturbations": str(tmp_path / "f.safetensors")}
    save_file({"P": np.zeros(23, np.float32), "Q": np.zeros(23, np.float32)}, tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="width 23; the checkpoint takes 24"):
        predict(imported, tmp_path / "out.h5ad", PredictConfig(**files, only="P", cell_type="x"))
    shutil.rmtree(cache)
    write_cache(cache, [small_screen(n_controls=11)])
    with pytest.raises(InputError, match="embeddings of width 6; the checkpoint takes 20"):
        predict(imported, tmp_path / "out.h5ad", PredictConfig(**files, only="P", cell_type="x"))
    assert not (tmp_path / "out.h5ad").exists()


def test_a_run_folder_brings_its_perturbations_and_columns(
    read: TransitionCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the heads on the hub lie there; 24 is the width of the reference's features."""
    monkeypatch.setattr(import_upstream, "load_transition", lambda source: read)
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "final.ckpt").write_bytes(b"read by the fixture")
    vectors = {name: torch.from_numpy(rng.random(24, np.float32)) for name in ("B", "A", "non-targeting")}
    torch.save(vectors, folder / "pert_onehot_map.pt")
    (folder / "config.yaml").write_text("data:\n  kwargs: {pert_col: gene, cell_type_key: kind, batch_col: 3}\n")
    notes = Notes()
    with reporting(notes):
        state = import_checkpoint(folder, tmp_path / "out", target_sum=5000)
    assert any("log1p of counts normalised to 5000" in note for note in notes.notes)
    assert (state["target_sum"], state["cells"]["perturbations"]) == (5000, ["non-targeting", "B", "A"])
    assert state["columns"] == {"perturbation": "gene", "cell_type": "kind", "batch": None, "control": "non-targeting"}
    known = known_without_cells(open_checkpoint(tmp_path / "out"), None)
    assert known is not None and known.features.width == 24
    for name in ("A", "non-targeting"):
        np.testing.assert_array_equal(known.features.vectors.find(name), vectors[name].numpy())
    same = import_checkpoint(folder / "checkpoints" / "final.ckpt", tmp_path / "of_file")
    assert same["cells"] == state["cells"]

    torch.save({"A": torch.ones(3)}, folder / "pert_onehot_map.pt")
    with pytest.raises(InputError, match=r"pert_onehot_map\.pt has vectors of width 3; final\.ckpt takes 24"):
        import_checkpoint(folder, tmp_path / "x")
    (folder / "pert_onehot_map.pt").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"pert_onehot_map\.pt"):
        import_checkpoint(folder, tmp_path / "x")
    (folder / "checkpoints" / "final.ckpt").rename(folder / "checkpoints" / "step=1.ckpt")
    (folder / "checkpoints" / "step=2.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"Name the one to import"):
        import_checkpoint(folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_genes_that_the_checkpoint_does_not_name_are_those_of_var_dims(
    read: TransitionCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unnamed = {key: value for key, value in read.hyper_parameters.items() if key != "gene_names"}
    monkeypatch.setattr(
        import_upstream, "load_transition", lambda source: TransitionCheckpoint(read.tensors, unnamed, read.step)
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "final.ckpt").write_bytes(b"read by the fixture")
    state, dims = import_checkpoint(tmp_path / "run", tmp_path / "none"), tmp_path / "run" / "var_dims.pkl"
    n_genes = state["sizes"]["n_genes"]
    names = [f"G{i}" for i in range(n_genes)]
    assert state["genes"] == [] and n_genes > 1
    dims.write_bytes(pickle.dumps({"output_dim": n_genes, "gene_names": names}))
    assert import_checkpoint(tmp_path / "run", tmp_path / "named")["genes"] == names
    dims.write_bytes(pickle.dumps({"gene_names": names[1:]}))  # of something else
    assert import_checkpoint(tmp_path / "run", tmp_path / "others")["genes"] == []
    dims.write_bytes(pickle.dumps({"gene_names": print}))
    with reporting(notes := Notes()):
        assert import_checkpoint(tmp_path / "run", tmp_path / "hostile")["genes"] == []
    assert any("stay without names: var_dims.pkl" in note for note in notes.notes)


def test_a_batch_encoder_becomes_the_bias_of_one_batch(
    read: TransitionCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a .ckpt alone batches are numbered."""
    vectors = torch.rand(3, 48, generator=torch.Generator().manual_seed(0))
    with_batches = TransitionCheckpoint({**read.tensors, "batch_encoder.weight": vectors}, read.hyper_parameters, 5)
    monkeypatch.setattr(import_upstream, "load_transition", lambda source: with_batches)
    source = tmp_path / "up.ckpt"
    source.write_bytes(b"read by the fixture")
    for batch, expected in ((None, "Pass --batch with one of: 0, 1, 2"), ("9", "It has no batch '9'")):
        with pytest.raises(InputError, match=expected):
            import_checkpoint(source, tmp_path / "out", batch=batch)
    state = import_checkpoint(source, tmp_path / "out", batch="2")
    assert state["imported"]["batch"] == "2"
    found = open_checkpoint(tmp_path / "out").model_tensors()
    torch.testing.assert_close(found["pert_encoder.9.bias"], read.tensors["pert_encoder.9.bias"] + vectors[2])
    monkeypatch.setattr(import_upstream, "load_transition", lambda source: read)
    with pytest.raises(InputError, match=r"has no batch encoder\. Leave --batch out"):
        import_checkpoint(source, tmp_path / "other", batch="2")

"""The ancestor's keys: every one stands for an option that exists, and means what it says or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from sest.cli.main import app
from sest.compat.ancestor import (
    CONFIGS,
    FIXED,
    KEYS,
    PLACE,
    SE_FOLDER,
    SIZE,
    TOML,
    checkpoint_folder,
    in_keys,
    read_request,
)
from sest.errors import InputError

LEAST = (f"++{TOML}=data/starter.toml", f"++{SE_FOLDER}=SE-600M")
BACKBONE = "model.kwargs.transformer_backbone_kwargs"


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as refused:
        read_request([*LEAST, *words])
    return str(refused.value)


def test_every_key_stands_for_an_option_that_exists() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for key in KEYS.values():
        assert key.kind in (PLACE, SIZE, FIXED, *CONFIGS)
        for command, config in zip(key.kind.split(", "), CONFIGS.get(key.kind, ()), strict=False):
            assert key.field in config.names(), key.name
            assert f"--{key.option}" in {text for p in commands[command].params for text in p.opts}, key.name
        if key.kind == FIXED:
            assert key.words and key.note and not key.option, key.name


def test_the_least_that_must_be_given_comes_to_two_commands() -> None:
    request = read_request(LEAST)
    assert request.embed_command() == "sest embed data/starter.toml --encoder SE-600M --cache outputs/cache".split()
    expected = "sest train outputs/cache --run outputs/se_st_training --splits data/starter.toml --perturbations onehot"
    expected += " --preset full"  # whatever the data
    assert request.train_command(None) == expected.split()
    assert request.train_command("auto")[5:7] == ["--resume", "auto"]


def test_keys_come_to_the_options_they_stand_for() -> None:
    words = (
        "++training.val_check_interval=250 ++training.early_stopping=false ++training.gradient_clip_val=10 "
        "++training.lr=1e-4 ++trainer.precision=bf16-mixed ++training.train_seed=42 ++model.kwargs.hidden_dim=512 "
        f"++model.kwargs.cell_set_len=64 ++{BACKBONE}.hidden_size=672 ++{BACKBONE}.num_attention_heads=8 "
        "++data.kwargs.pert_col=target_gene ++data.kwargs.control_pert=007 ++accelerator=gpu ++use_wandb=False "
        "++data.kwargs.basal_mapping_strategy=random ++data.kwargs.embed_key=null ++training.patience=null"
    )
    request = read_request([*LEAST, *words.split()])
    assert request.embed == {"dim": 512, "pert_col": "target_gene", "control": "007", "device": "cuda"}
    assert request.train == {
        "splits": "data/starter.toml",
        "perturbations": "onehot",
        "val_every": 250,
        "early_stopping": False,
        "clip": 10,
        "lr": 1e-4,
        "precision": "bf16",
        "seed": 42,
        "set_size": 64,
        "hidden": 672,
        "n_heads": 8,
        "device": "cuda",
        "match_controls": "context",
    }
    assert "--no-early-stopping" in request.train_command(None)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("++training.max_step=5", ["Unknown key 'training.max_step'", "'training.max_steps'", "--help"]),
        ("++training.max_steps=many", ["++training.max_steps=many", "a whole number"]),
        ("++training.max_steps=0", ["++training.max_steps=0", "at least 1"]),
        ("++training.max_steps=5e3", ["++training.max_steps=5e3", "a whole number"]),
        ("++training.early_stopping=1", ["++training.early_stopping=1", "true or false"]),
        ("++training.precision=64", ["++training.precision=64", "16-mixed"]),
        ("++training.devices=4", ["++training.devices=4", "torchrun", "It takes 1"]),
        ("++model.kwargs.hidden_dim=wide", ["++model.kwargs.hidden_dim=wide", "a whole number"]),
        ("++model.kwargs.hidden_dim=true", ["a whole number"]),
        ("++model.kwargs.batch_encoder=true", ["++model.kwargs.batch_encoder=true", "It takes false"]),
        ("++model.kwargs.freeze_se_model=false", ["the encoder is never trained", "It takes true"]),
        ("++data.kwargs.embed_key=X_state", ["se_model_path", "It takes null"]),
        ("++model=pertsets", ["It takes se_st_combined"]),
        ("++use_wandb=true", ["++wandb.project=NAME", "metrics.jsonl", "It takes false"]),
        ("++overwrite=true", ["delete its folder", "++name"]),
        ("++save_top_k=3", ["a run keeps the best", "It takes 1"]),
        ("++model.kwargs.pert_dim=5120", ["pert_dim", "perturbation_features_file"]),
        ("++name=cache", ["cache is for the embeddings", "another ++name"]),
        ("++name=cache/run", ["is for the embeddings"]),
        ("++model.kwargs.se_checkpoint_path=other/se.ckpt", ["other/se.ckpt", "not in model.kwargs.se_model_path"]),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(word: str, parts: list[str]) -> None:
    line = refusal(word)
    assert all(part in line for part in parts), line
    assert "\n" not in line


def test_keys_that_contradict_each_other_are_refused() -> None:
    line = refusal("++training.val_freq=100", "++training.val_check_interval=500")
    assert "++training.val_freq=100 and ++training.val_check_interval=500" in line and "--val-every" in line
    assert read_request([*LEAST, "training.val_freq=5", "training.val_check_interval=5"]).train["val_every"] == 5
    assert "contradict" in refusal("++use_wandb=false", "++wandb.project=vcc")
    assert read_request([*LEAST, "++wandb.project=vcc"]).train["wandb"] == "vcc"
    line = refusal("++model.kwargs.input_dim=18080", "++model.kwargs.output_dim=512")
    assert "input_dim is 18080" in line and "output_dim is 512" in line


def test_a_missing_encoder_or_toml_is_named_with_what_may_stand_there() -> None:
    with pytest.raises(InputError, match=r"No encoder\. Give \+\+model\.kwargs\.se_model_path=SE-600M.*=pca"):
        read_request(LEAST[:1])
    with pytest.raises(InputError, match=r"No cells\. Give \+\+data\.kwargs\.toml_config_path=FILE\.toml"):
        read_request(LEAST[1:])
    with pytest.raises(InputError, match=r"pca has no weights\. Leave it out"):
        read_request([LEAST[0], f"++{SE_FOLDER}=pca", "++model.kwargs.se_checkpoint_path=SE-600M/se.ckpt"])


def test_checkpoint_names_come_to_our_folders(tmp_path: Path) -> None:
    names = {
        "c/stage1/checkpoint-step-5000.ckpt": "c/stage1/checkpoint-step-5000",
        "c/stage1/checkpoint-step-5000": "c/stage1/checkpoint-step-5000",
        "c/stage1/last.ckpt": "c/stage1/last",
        "c/stage1/final_model.ckpt": "c/stage1/last",
        "c/stage1/best_model.ckpt": "c/stage1/best",
    }
    assert {name: str(checkpoint_folder(name)) for name in names} == names
    (tmp_path / "final.ckpt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"`sest import \S+/final\.ckpt OUT`"):
        checkpoint_folder(str(tmp_path / "final.ckpt"))


def test_errors_name_the_ancestor_s_keys() -> None:
    line = "Use --accumulate 4 or --set-size. Run `sest embed --cache X`. Pass --layer. Go on with --resume auto."
    expected = (
        "Use ++training.accumulate_grad_batches=4 or ++model.kwargs.st_cell_set_len. Run `sest embed --cache X`. "
        "Pass --layer. Go on with the same command."
    )
    assert in_keys(line) == expected

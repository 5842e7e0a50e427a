"""Configurations: kinds, choices and limits of every field, unknown keys, and the way to TOML and back."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from sest.config import (
    EmbedConfig,
    EvaluateConfig,
    PipelineConfig,
    PredictConfig,
    ReportConfig,
    TrainConfig,
    upgraded,
)
from sest.errors import InputError
from sest.options import RENAMED, Config
from sest.simulation.simulation import Simulation

CLASSES = (Simulation, EmbedConfig, TrainConfig, PredictConfig, EvaluateConfig, ReportConfig, PipelineConfig)


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match=r"Unknown key 'batchsize' in run.toml. Did you mean 'batch_size'"):
        TrainConfig.from_values({"batchsize": 3}, "run.toml")


def test_an_unknown_key_far_from_all_others_still_lists_what_is_known() -> None:
    with pytest.raises(InputError, match=r"Unknown key 'zzzz'.*Known: .*max_steps"):
        TrainConfig.from_values({"zzzz": 3}, "run.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": "5"}, "max-steps is '5'; it takes a whole number"),
        ({"max_steps": 5.0}, "max-steps is 5.0; it takes a whole number"),
        ({"max_steps": True}, "max-steps is True; it takes a whole number"),
        ({"lr": "fast"}, "lr is 'fast'; it takes a number"),
        ({"lr": True}, "lr is True; it takes a number"),
        ({"early_stopping": 1}, "early-stopping is 1; it takes true or false"),
        ({"splits": 3}, "splits is 3; it takes text or nothing"),
        ({"target_sum": "mean"}, "target-sum is 'mean'; it takes a number or one of: median. Did you mean 'median'"),
        ({"target_sum": True}, "target-sum is True; it takes a number or text"),
        ({"loss": "enrgy"}, "loss is 'enrgy'; it takes one of: energy, mse, energy+sinkhorn. Did you mean 'energy'"),
        ({"max_steps": 0}, "max-steps is 0; it must be at least 1"),
        ({"set_size": -1}, "set-size is -1; it must be at least 0"),
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"lr": float("nan")}, "lr is nan; it must be at least 0"),
        ({"dropout": 1.5}, "dropout is 1.5; it must be at most 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most"),
    ],
)
def test_a_value_of_another_kind_or_out_of_range_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        TrainConfig.from_values(values, "here")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_whole_number_serves_where_a_number_is_wanted() -> None:
    config = TrainConfig.from_values({"lr": 1, "clip": 0}, "here")
    assert isinstance(config.lr, float) and config.lr == 1.0
    assert isinstance(config.clip, float) and config.clip == 0.0


@pytest.mark.parametrize(
    ("given", "dim"),
    [(512, 512), ("512", 512), ("native", "native"), ("state", "state"), (None, None)],
)
def test_a_width_is_a_number_or_a_word(given: Any, dim: Any) -> None:
    kept = EmbedConfig(dim=given).dim
    assert kept == dim and type(kept) is type(dim)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0", "dim is 0; it must be at least 1"),
        (-1, "dim is -1; it must be at least 1"),
        ("small", "dim is 'small'; it takes a whole number or one of: native, state."),
        ("nativ", "Did you mean 'native'"),
        (5.0, "dim is 5.0; it takes a whole number or text or nothing"),
        ("1" * 5000, "it takes a whole number"),
    ],
)
def test_a_width_that_is_neither_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        EmbedConfig(dim=given)
    assert message in str(error.value)


@pytest.mark.parametrize(("given", "kept"), [(10_000, 1e4), ("10000", 1e4), ("1e4", 1e4), ("median", "median")])
def test_a_target_sum_is_a_number_or_the_median(given: Any, kept: Any) -> None:
    assert TrainConfig(target_sum=given).target_sum == kept and type(TrainConfig(target_sum=given).target_sum) is type(
        kept
    )


def test_a_path_may_be_given_where_text_is_wanted(tmp_path: Path) -> None:
    config = TrainConfig.from_values({"splits": tmp_path / "a.toml", "perturbations": tmp_path / "b.pt"}, "here")
    assert config.splits == f"{tmp_path}/a.toml" and config.perturbations == f"{tmp_path}/b.pt"
    with pytest.raises(InputError, match=r"lr is .*; it takes a number"):
        TrainConfig.from_values({"lr": tmp_path}, "here")


@pytest.mark.parametrize("config", [EmbedConfig, TrainConfig, PredictConfig])
def test_a_renamed_key_is_refused_with_its_new_name(config: type[Config]) -> None:
    for old, new in RENAMED[config.__name__].items():
        with pytest.raises(InputError) as error:
            config.from_values({old: "x"}, "run.toml")
        assert str(error.value) == f"run.toml: {old} is now {new}."
        assert new in config.names() and old not in config.names()


def test_what_an_earlier_version_wrote_is_read_as_the_same_configuration() -> None:
    earlier = {"controls": "batch", "target_sum": "10000", "set_size": 8, "lr": 1e-4, "unknown": "kept"}
    assert upgraded(earlier) == {
        "head": "st",
        "monitor": "val_loss",
        "match_controls": "batch",
        "target_sum": 1e4,
        "set_size": 8,
        "lr": 1e-4,
        "unknown": "kept",
        "val_contexts": "all",
        "ema": 0.0,
        "gene_axis": "common",
        "perturbations": "onehot",
    }
    now = TrainConfig(match_controls="batch", target_sum="median", early_stopping=True, splits="s.toml").to_values()
    assert upgraded(now) == now and type(upgraded(earlier)["target_sum"]) is float


@pytest.mark.parametrize("config", CLASSES)
def test_every_field_has_a_line_of_help_and_a_default_that_passes_its_own_checks(config: type[Config]) -> None:
    config()  # raises where a default is out of range
    for field in dataclasses.fields(config):
        assert field.metadata["help"] and "\n" not in field.metadata["help"], field.name


@settings(deadline=None)  # a loaded machine is slow now and then
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_steps": st.integers(1, 10**9),
            "lr": st.floats(0, 1e3),
            "dropout": st.floats(0, 1),
            "early_stopping": st.booleans(),
            "splits": st.none() | st.text("ab /.\\\"'é\t", max_size=20),
            "target_sum": st.sampled_from(["median", "10000", "1e4", 1e4, 5000]),
            "loss": st.sampled_from(["energy", "mse"]),
            "seed": st.integers(0, 2**63 - 1),
        },
    )
)
def test_a_configuration_written_as_toml_is_read_back_as_the_same(values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    again = tomllib.loads(tomli_w.dumps(config.to_values()))
    assert TrainConfig.from_values(again, "toml") == config

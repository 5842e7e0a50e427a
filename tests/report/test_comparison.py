"""Runs beside each other: which is better, by how much, and whether that can be said."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.configs import small_config
from helpers.pages import Trained, facts, opened, validation
from sest.report.comparison import different_tasks, differing_options, ranking, same_baselines
from sest.report.write import write_report
from sest.training.train import train


def test_runs_are_compared_and_the_better_one_is_named(trained: Trained, other: Path, tmp_path: Path) -> None:
    write_report([trained.run, other], tmp_path / "r.html", with_model=False)
    page = opened(tmp_path / "r.html")
    best = {
        run.name: min(line["val_loss"] for line in Trained(trained.group, trained.cache, run).validations)
        for run in (trained.run, other)
    }
    low, high = sorted(best, key=best.__getitem__)
    share = (best[high] - best[low]) / best[high]
    expected = (
        f"{low} has the lower best val_loss: {best[low]:.4g}, against {best[high]:.4g} of {high} ({share:.1%} lower)."
    )
    assert expected in page.words
    comparison = page.section("comparison")
    assert re.search(
        rf">perturbation mean</td>\s*<td[^>]*>-</td>\s*<td[^>]*>{trained.best['val_loss_perturbation_mean']:.4g}<",
        comparison,
    )
    assert "hidden" in comparison.split("What differs")[1] and "24" in comparison and "n_layers" not in comparison
    assert "not measured on the same task" not in page.words
    plot = next(f for f in page.figures.values() if f["layout"]["yaxis"]["title"]["text"] == "val_loss")
    assert [trace["name"] for trace in plot["data"]] == ["run", "wider"]
    assert {"run-1-diagnosis", "run-2-configuration"} <= {a.get("id") for _, a in page.elements}


def test_runs_on_different_tasks_are_warned_about(trained: Trained, tmp_path: Path) -> None:
    for name, changes, words in (
        ("sets", {"set_size": 3}, "--set-size"),
        ("sums", {"target_sum": "500"}, "the target sum"),
        ("splits", {"splits": None}, "the splits"),
    ):
        config = small_config(**({"splits": str(trained.run.parent / "splits.toml")} | changes))
        train(trained.cache, tmp_path / name, config)
        write_report([trained.run, tmp_path / name], tmp_path / "r.html", with_model=False, force=True)
        warned = re.search(r"These runs differ in ([^:]*):", opened(tmp_path / "r.html").words)
        assert warned and words in warned[1] and "the validation cells" in warned[1]


# --- what is said of runs, from their lines alone


def test_runs_that_were_not_validated_are_not_ranked() -> None:
    validated = facts("a", [validation(4, 1.0)])
    assert "nothing to compare yet" in ranking([validated, facts("b")])


def test_of_three_runs_the_lowest_is_named_first_and_the_others_in_order() -> None:
    runs = [facts(name, [validation(4, loss)]) for name, loss in (("a", 2.0), ("b", 1.0), ("c", 4.0))]
    assert ranking(runs) == "b has the lowest best val_loss: 1, against 2 of a (50.0% lower), 4 of c (75.0% lower)."


def test_baselines_tell_whether_the_validation_cells_are_the_same() -> None:
    same = [facts("a", [validation(4, 1.0)]), facts("b", [validation(4, 1.5, controls=3.0002)])]
    assert same_baselines(same) and different_tasks(same) == []  # devices differ by less than 1e-4
    apart = [same[0], facts("c", [validation(4, 1.0, controls=3.001)])]
    assert not same_baselines(apart)
    assert different_tasks(apart) == ["the validation cells (predicting the controls scores 3 to 3.001)"]
    assert same_baselines([facts("d")])


def test_the_share_held_out_makes_no_difference_where_splits_are_given() -> None:
    runs = [facts(str(share), val_fraction=share, splits="s.toml") for share in (0.1, 0.2)]
    assert different_tasks(runs) == []
    runs = [facts(str(share), val_fraction=share) for share in (0.1, 0.2)]
    assert different_tasks(runs) == ["--val-fraction"]


def test_options_are_listed_where_they_differ_and_places_of_files_are_not() -> None:
    runs = [facts("a", hidden=16, splits="x.toml"), facts("b", hidden=24, splits="y.toml")]
    assert differing_options(runs) == {"hidden": [16, 24]}

"""What is measured and published: files of runs, and the table made from them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simplenet_lib.benchmark import (
    PAPER,
    PUBLISHED_MEANS,
    is_done,
    mean_and_deviation,
    measured_runs,
    read_runs,
    table,
)
from simplenet_lib.config import SimpleNetError, preset

CONFIG = preset("fast")
RUN = {"dataset": "set", "category": "nut", "seed": 0, "config": json.loads(CONFIG.to_json())}


def test_papers_categories_average_to_the_papers_mean() -> None:
    assert len(PAPER) == 15
    means = np.mean(list(PAPER.values()), axis=0)
    # The second is 98.15 before rounding, so a transcribed mean may round either way.
    assert np.abs(means - PUBLISHED_MEANS["SimpleNet, paper"][:2]).max() <= 0.055


def test_committed_runs_are_whole_and_hold_three_seeds() -> None:
    runs = measured_runs()
    assert {(run["category"], run["preset"]) for run in runs} >= {
        ("bottle", "fast"),
        ("grid", "fast"),
        ("weld", "fast"),
        ("bottle", "course"),
    }
    for run in runs:
        assert 0 <= run["image_auroc"] <= 1 and 0 <= run["aupro"] <= 1
        assert run["config"]["seed"] == run["seed"]
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in measured_runs("ablation"):
        seeds.setdefault((run["category"], run["variant"]), set()).add(run["seed"])
    for (_, variant), found in seeds.items():
        assert found == ({0} if variant.startswith("pixel") else {0, 1, 2})


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_mean_and_deviation_are_numpys(values: list[float]) -> None:
    mean, deviation = mean_and_deviation(values).split(" ± ")
    assert float(mean) == pytest.approx(100 * np.mean(values), abs=0.0501)
    assert float(deviation) == pytest.approx(100 * np.std(values), abs=0.0501)


def test_one_value_has_no_deviation() -> None:
    assert mean_and_deviation([0.5]) == "50.0"


def test_table_groups_seeds_and_leaves_out_what_was_not_measured() -> None:
    run = {"category": "nut", "preset": "fast", "image_auroc": 0.9, "image_ap": 1.0}
    run |= {"image_f1max": 1.0, "seconds_features": 30.0, "seconds_training": 10.0}
    other = {**run, "image_auroc": 1.0, "seconds_features": 0.1, "seconds_training": 20.0}
    *_, row = table([run, other]).splitlines()
    assert row == (
        "| nut | `fast` | 2 | 95.0 ± 5.0 | 100.0 ± 0.0 | 100.0 ± 0.0 | no masks | no masks"
        " | 30 | 15 |"
    )


def test_a_run_is_done_if_its_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "nut-fast-0.json"
    assert not is_done(path, "set", "nut", CONFIG)
    path.write_text(json.dumps(RUN))
    assert is_done(path, "set", "nut", CONFIG)
    for dataset, category, config in (
        ("other", "nut", CONFIG),
        ("set", "bolt", CONFIG),
        ("set", "nut", preset("fast", sigma=0.4)),
        ("set", "nut", preset("fast", seed=1)),
    ):
        with pytest.raises(SimpleNetError, match="another data set or configuration"):
            is_done(path, dataset, category, config)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{}", '{"category": "nut"}', "\x00"])
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SimpleNetError, match=r"a\.json: not a"):
        read_runs(tmp_path)

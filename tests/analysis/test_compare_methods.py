"""The table and the plot of benchmarks/compare_methods.py, from synthetic runs."""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import paired_runs
import pytest
from PIL import Image

from benchmarks import compare_methods as compare
from benchmarks.label_plot import plot
from rlrt_lightning.analysis import events

Curves = dict[str, list[tuple[int, float]]]


def curves(careful_end: float | None, reward: float = 0.5, skip: float = 0.25) -> Curves:
    """The metrics of a run of four epochs with three evaluations; without a share, nothing is careful at the end."""
    steps = [1, 3, 5, 7]
    careful = [(0, 0.02), (3, 0.9)] + ([] if careful_end is None else [(7, careful_end)])
    return {
        "rollout/reward": [(step, reward + 0.1 * i) for i, step in enumerate(steps)],
        "labels/guess": [(1, 1.0), (3, 0.75)],
        "labels/careful": [(3, 0.25), (5, 1.0), (7, 1.0)],
        "eval/heldout/avg@8": [(0, 0.1), (3, 0.6), (7, 0.9)],
        "eval/longer/avg@8": [(0, 0.1), (3, 0.5), (7, 0.8)],
        "eval/longer/labels/skip": [(0, 0.1), (3, 0.9), (7, skip)],
        "eval/heldout/labels/careful": careful,
    }


def test_the_summary_of_a_run_is_its_mean_its_middle_and_its_end() -> None:
    values = compare.summary(curves(0.75))
    expected = {
        "reward": 0.65,
        "avg@8 middle": 0.6,
        "avg@8 end": 0.9,
        "longer end": 0.8,
        "careful end": 0.75,
        "skip, longer end": 0.25,
    }
    assert values == pytest.approx(expected)


def test_a_way_that_is_gone_at_the_end_has_no_share_left() -> None:
    """Its metric ends with the last evaluation in which it occurred."""
    assert compare.summary(curves(None))["careful end"] == 0
    never = {tag: curve for tag, curve in curves(None).items() if "careful" not in tag}
    assert compare.summary(never)["careful end"] == 0


def test_the_shares_of_an_epoch_sum_to_one() -> None:
    rows = compare.epochs(curves(0.75))
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [(row["guess"], row["careful"]) for row in rows] == [(1, 0), (0.75, 0.25), (0, 1), (0, 1)]
    assert [sum(row[way] for way in compare.WAYS) for row in rows] == [1, 1, 1, 1]


def finished_runs(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[compare.Run]:
    """Three seeds of two methods, with and without the trap; GRPO is caught by the trap with seed 7."""
    runs = [compare.Run(c, m, s) for c in ("trap", "control") for m in ("GRPO", "RLRT") for s in (5, 6, 7)]
    found = {}
    for run in runs:
        folder = run.folder(out)
        folder.mkdir(parents=True)
        (folder / "events.out.tfevents.1").touch()
        caught = run.condition == "trap" and run.method == "GRPO" and run.seed == 7
        gain = run.seed / 100 if run.method == "RLRT" else 0.0
        found[folder] = curves(0.25 if caught else 0.95, 0.5 + gain, skip=0.75 if caught else 0.25)
    monkeypatch.setattr(events, "scalars", found.__getitem__)
    return runs


def test_the_tables_come_from_the_files_the_trap_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = finished_runs(tmp_path / "out", monkeypatch)
    compare.collect(runs[6:], tmp_path / "out", tmp_path / "results")
    compare.collect(runs[:9], tmp_path / "out", tmp_path / "results")  # keeps the last three rows
    assert len(paired_runs.read_csv(tmp_path / "results" / "labels.csv", compare.WORDS)) == 12 * 4
    trap, control = compare.tables(paired_runs.read_csv(tmp_path / "results" / "runs.csv", compare.WORDS)).split(
        "\n\nControl"
    )
    assert trap.startswith("With the trap, 3 seeds (5 to 7):")
    assert "| 1 of 3 | - |" in trap
    # The differences are 0.05, 0.06 and 0.07: 0.06 ± 4.303 * 0.01 / sqrt(3).
    assert "| 0 of 3 | +0.060 (+0.035 to +0.085) |" in trap
    assert "| RLRT | 3 | 0 | 1 | 0 | 1.00 |\n\np: exact McNemar test." in trap
    assert control.count("| 0 of 3 |") == 2
    assert "McNemar" not in control
    assert "0.650 ± 0.000" in control


@pytest.mark.parametrize(
    ("grpo", "rlrt", "p"),
    [("111110000", "000000000", "0.06"), ("1111100", "0000011", "0.45"), ("11100", "11100", "1.00")],
)
def test_the_exact_test_of_paired_runs(grpo: str, rlrt: str, p: str) -> None:
    rows = [
        {"method": name, "seed": str(seed), "skip, longer end": caught}
        for name, run in (("GRPO", grpo), ("RLRT", rlrt))
        for seed, caught in enumerate(run)
    ]
    assert f" | {p} |\n\np: exact McNemar test." in compare.caught_in_pairs(rows, "GRPO")
    twice = compare.caught_in_pairs(
        [*rows, *({**row, "method": "SDPO"} for row in rows if row["method"] == "RLRT")], "GRPO"
    )
    assert f" | {min(1, 2 * float(p)):.1f}" in twice.split("| SDPO")[1]
    assert "corrected for 2 comparisons" in twice


def test_the_paired_interval_covers_the_mean_in_95_percent_of_the_cases() -> None:
    rng = random.Random(0)
    for n, trials in ((3, 4000), (16, 4000), (40, 2000)):
        intervals = [paired_runs.paired([rng.gauss(0.3, 2) for _ in range(n)]) for _ in range(trials)]
        covered = sum(low <= 0.3 <= high for _, low, high in intervals) / trials
        assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / trials)), n
    mean, low, high = paired_runs.paired([0.0, 1.0, 2.0], comparisons=4)
    assert (mean, low, high) == pytest.approx((1, 1 - 8.8602 / 3**0.5, 1 + 8.8602 / 3**0.5), abs=1e-4)


def test_methods_are_compared_to_the_baseline_with_the_same_seed() -> None:
    scores = {("RLRT", 1.0): 0.3, ("RLRT", 2.0): 0.5, ("GRPO", 1.0): 0.1, ("GRPO", 2.0): 0.2, ("GRPO", 3.0): 9.0}
    found = paired_runs.gains(scores, "GRPO")
    assert found == {"RLRT": "+0.250 (-0.385 to +0.885)", "GRPO": "-"}
    assert paired_runs.gains(scores, "RLRT")["GRPO"] == "-0.250 (-0.885 to +0.385)"
    wider = paired_runs.gains({**scores, ("SDPO", 1.0): 0.1}, "GRPO")
    assert wider["RLRT"] != found["RLRT"], "corrected for two methods"
    assert wider["SDPO"] == "-", "one difference has no spread"
    with pytest.raises(SystemExit, match="--baseline has to be a method with runs, one of RLRT, GRPO"):
        paired_runs.gains(scores, "RLSD")


def test_quantiles_of_students_t() -> None:
    for freedom, expected in ((1, 12.706), (2, 4.303), (15, 2.131), (1000, 1.962)):
        assert paired_runs.students_t(0.975, freedom) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("text", "seeds"), [("200-202", [200, 201, 202]), ("3", [0, 1, 2]), ("7-7", [7])])
def test_seeds_are_a_range_or_a_count(text: str, seeds: list[int]) -> None:
    assert paired_runs.seed_range(text) == seeds


@pytest.mark.parametrize("text", ["0", "9-3", "a", "1-", "-3"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither a range such as 200-215 nor a count"):
        paired_runs.seed_range(text)


def test_the_control_has_no_trap_in_any_of_its_questions(tmp_path: Path) -> None:
    run = compare.Run("control", "GRPO", 3)
    flags = compare.settings(run, tmp_path, [])
    assert "--data.task.trap=false" in flags
    assert "--data.benchmarks.longer.task.trap=false" in flags
    assert f"--model.policy.path={tmp_path / 'control-weights'}" in flags
    assert compare.settings(run._replace(condition="trap"), tmp_path, ["--x=1"]) == ["--seed_everything=3", "--x=1"]


def test_finished_runs_are_skipped_and_interrupted_ones_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    run = compare.Run("trap", "RLRT", 0)

    def execute(arguments: list[str], name: str) -> None:
        started.append(name)
        assert not run.folder(tmp_path).exists(), "nothing is left of the interrupted run"
        run.folder(tmp_path).mkdir(parents=True)

    monkeypatch.setattr(compare, "execute", execute)
    (run.folder(tmp_path) / "version_0").mkdir(parents=True)
    compare.train_all([run], tmp_path, [], 1)
    compare.train_all([run], tmp_path, [], 1)
    assert started == ["trap, RLRT, seed 0"]
    with pytest.raises(SystemExit, match="was trained with other settings or weights; set --out to another folder"):
        compare.train_all([run], tmp_path, ["--trainer.max_epochs=2"], 1)


def test_the_controls_weights_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def execute(arguments: list[str], name: str) -> None:
        made.append(arguments)
        (tmp_path / "control-weights").mkdir()

    monkeypatch.setattr(compare, "execute", execute)
    (tmp_path / "control-weights").mkdir()  # incomplete
    compare.make_control_weights(tmp_path)
    compare.make_control_weights(tmp_path)
    assert [arguments[1:] for arguments in made] == [["--no-trap", "--out", str(tmp_path / "control-weights")]]
    (tmp_path / "control-weights" / "done").write_text("by another version")
    with pytest.raises(SystemExit, match="delete it to make it anew"):
        compare.make_control_weights(tmp_path)


# -- the plot ------------------------------------------------------------------------------------------------------


def rows(methods: list[str], conditions: tuple[str, ...] = compare.CONDITIONS) -> list[dict[str, Any]]:
    """Shares over 20 epochs, five seeds each: `careful` replaces `guess`, and `skip` without it for one seed."""
    found = []
    for condition in conditions:
        second = "skip" if condition == "trap" else "quick"
        for method in methods:
            for seed in range(5):
                for epoch in range(20):
                    way = second if seed == 0 else "careful"
                    shares = {**dict.fromkeys(compare.WAYS, 0.0), "guess": 1 - epoch / 20, way: epoch / 20}
                    found.append(
                        {
                            "condition": condition,
                            "method": method,
                            "seed": seed,
                            "epoch": epoch,
                            "reward": 0.5,
                            **shares,
                        }
                    )
    return found


def image(path: Path) -> tuple[tuple[int, int], set[Any]]:
    """The size of an image, and its colours."""
    with Image.open(path) as picture:
        return picture.size, {rgb for _, rgb in picture.convert("RGB").getcolors(1 << 24) or []}


def test_the_plot_has_a_row_for_the_trap_and_one_for_the_control(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "labels.png"
    guess, skip, quick, careful = (153, 153, 153), (230, 159, 0), (86, 180, 233), (0, 158, 115)
    plot(rows(["GRPO", "RLRT"]), path)
    (width, height), colors = image(path)
    assert width == 1700
    assert {guess, skip, quick, careful} <= colors
    plot(rows(["GRPO"], ("trap",)), path)
    (width, lower), colors = image(path)
    assert (width, lower < height) == (1700, True)
    assert {guess, skip, careful} <= colors
    assert quick not in colors, "what does not occur is not explained"


def test_more_methods_than_fit_are_refused(tmp_path: Path) -> None:
    every = rows(list(compare.METHODS), ("trap",))
    plot(every, tmp_path / "labels.png")
    with pytest.raises(SystemExit, match="at most 5 methods with runs"):
        plot(every, tmp_path / "labels.png", list(compare.METHODS))
    with pytest.raises(SystemExit, match="at most 5 methods with runs, of GRPO"):
        plot(rows(["GRPO"]), tmp_path / "labels.png", ["RLRT"])

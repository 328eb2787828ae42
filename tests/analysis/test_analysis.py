"""The paper's analyses: their values against brute force, and their commands."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from rlrt_lightning.__main__ import main
from rlrt_lightning.analysis.reflection import choose_positions, difficulty, flip_rates, position_kl
from rlrt_lightning.analysis.shift import compare_positions, summarize
from rlrt_lightning.evaluation.metrics import mean_with_interval
from rlrt_lightning.evaluation.results import pass_curve
from tests.helpers.command_line import TRAIN_ONLY, cli_exit_code
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT
from tests.helpers.tiny import tiny_policy


def logits(seed: int, tokens: int = 4, vocabulary: int = 9) -> torch.Tensor:
    return 2 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_plot_written(folder: Path, name: str) -> None:
    """The plot exists in both formats and is not empty."""
    picture = Image.open(folder / f"{name}.png").convert("L")
    assert picture.width > 500
    assert len(picture.getcolors(1 << 20) or []) > 10
    assert "</svg>" in (folder / f"{name}.svg").read_text(encoding="utf-8")


# -- values by brute force -----------------------------------------------------------------------------------------


def test_position_kl_is_the_sum_over_the_vocabulary() -> None:
    student, teacher = logits(0), logits(1)
    p, q = student.softmax(-1).tolist(), teacher.softmax(-1).tolist()
    expected = [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    assert position_kl(student, teacher)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_compare_positions_matches_the_definitions() -> None:
    trained, base = logits(2, tokens=6, vocabulary=30), logits(3, tokens=6, vocabulary=30)
    base[0] = trained[0]
    js, first, probability, same, overlap = compare_positions(trained, base)
    for t in range(6):
        p, q = trained[t].softmax(-1), base[t].softmax(-1)
        m = (p + q) / 2
        assert float(js[t]) == pytest.approx(
            float((p * (p / m).log()).sum() / 2 + (q * (q / m).log()).sum() / 2), abs=1e-12
        )
        ours, theirs = (sorted(range(30), key=lambda i, x=x: -float(x[i])) for x in (p, q))
        assert int(first[t]) == ours[0]
        assert float(probability[t]) == pytest.approx(float(q[ours[0]]))
        assert bool(same[t]) == (ours[0] == theirs[0])
        expected = [len(set(ours[:k]) & set(theirs[:k])) / k for k in range(1, 21)]
        assert overlap[t].tolist() == pytest.approx(expected)
    assert overlap[0].tolist() == [1.0] * 20


def test_the_summary_counts_only_shifted_positions() -> None:
    js = torch.tensor([0.05, 0.2, 0.3])
    summary = summarize(js, torch.tensor([1e-9, 0.5, 0.005]), torch.tensor([[0.0], [1.0], [0.0]]))
    assert summary["shifted"] == pytest.approx(2 / 3)
    assert summary["overlap@1"] == 0.5
    assert [summary[f"base_below_{t}"] for t in ("0.1", "0.01", "0.001")] == [0.5, 0.5, 0.0]
    assert "overlap@1" not in summarize(js[:1], torch.ones(1), torch.ones(1, 1)), "no position has shifted"


def test_problems_are_hard_or_easy_by_their_number_of_correct_samples() -> None:
    assert [difficulty(c, 8) for c in range(9)] == ["hard"] * 3 + [None, None] + ["easy"] * 3 + [None]


def test_positions_are_chosen_by_the_largest_smallest_and_a_random_kl() -> None:
    kl = torch.tensor([0.2, 0.9, 0.1])
    places = [choose_positions(kl, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert {(p["largest"], p["smallest"]) for p in places} == {(1, 2)}
    assert {p["random"] for p in places} == {0, 1, 2}


def test_flip_rates_are_means_over_problems() -> None:
    def row(problem: str, flipped: bool) -> dict[str, Any]:
        return {"kind": "hard", "text": "w", "where": "largest", "problem": problem, "flipped": flipped}

    (rate,) = flip_rates([row("a", True), row("a", True), row("a", False), row("a", False), row("b", True)])
    assert rate["problems"] == 2
    assert rate["flipped"] == 0.75
    assert (rate["flipped"], rate["low"], rate["high"]) == mean_with_interval([0.5, 1.0])
    (alone,) = flip_rates([row("a", True)])
    assert (alone["low"], alone["high"]) == (0, 1)


def test_pass_at_k_averages_seeds_instead_of_pooling_samples() -> None:
    """One seed always solves the problem, the other never: pass@2 averages to 1/2; pooled samples would give 5/6."""
    table = [{"problem": "a", "samples": 2, "correct": c} for c in (2, 0)]
    assert [point["pass"] for point in pass_curve(table)] == [0.5, 0.5]


def test_compare_aligns_the_response_tokens_and_works_in_chunks() -> None:
    made, other = tiny_policy(), torch.nn.Module()
    other.model = tiny_policy().model.eval()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.3)
    made.logits_chunk, made.score_tokens = 3, 16
    ours = [([2, 3], [4, 5, 6, 7]), ([8], [9, 10]), ([3, 3, 3], [4])]
    theirs = [([7, 7, 7, 2, 3], [4, 5, 6, 7]), ([8], [9, 10]), ([2], [4])]
    seen: list[int] = []

    def difference(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(a))
        return (a.log_softmax(-1) - b.log_softmax(-1),)

    for (got,), (p, r), (q, _) in zip(made.compare(difference, ours, theirs, other), ours, theirs, strict=True):
        with made.evaluating() as model:
            a = model(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            b = other.model(input_ids=torch.tensor([q + r])).logits[0, len(q) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(got, a - b, rtol=0, atol=1e-4)
    assert max(seen) <= 3


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with different seeds, and an evaluation of each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        run = folder / f"seed-{seed}"
        assert cli_exit_code("fit", run, "--trainer.max_epochs=2", f"--seed_everything={seed}", *TRAIN_ONLY) == 0
        checkpoint = run / "last-digit" / f"rlrt-{seed}" / "checkpoints" / "last.ckpt"
        flags = (f"--evaluation.results={folder / 'results' / seed}", f"--ckpt_path={checkpoint}")
        assert cli_exit_code("validate", run, *flags) == 0
    return folder


def test_curves_tabulates_and_plots_several_runs(trained: Path, tmp_path: Path) -> None:
    folders = [f"both={trained}", f"first={trained / 'seed-0'}"]
    assert main(["curves", *folders, "--out", str(tmp_path)]) == 0
    table = rows(tmp_path / "curves.csv")
    assert {(row["name"], row["run"]) for row in table} == {("both", "0"), ("both", "1"), ("first", "0")}
    assert {row["tag"] for row in table} == {"rollout/reward", "rollout/length", "rollout/entropy"}
    assert len(table) == 3 * 3 * 2
    assert_plot_written(tmp_path, "curves")


def test_pass_at_k_averages_several_evaluations(trained: Path, tmp_path: Path) -> None:
    args = ["pass_at_k", f"both={trained / 'results'}", f"first={trained / 'results' / '0'}", "--out", str(tmp_path)]
    assert main(args) == 0
    table = {
        (row["name"], row["benchmark"], int(row["k"])): float(row["pass"]) for row in rows(tmp_path / "pass_at_k.csv")
    }
    assert {key[2] for key in table} == {1, 2, 4, 8}
    correct = [
        sum(row["correct"] for row in pyarrow.parquet.read_table(path).to_pylist()) / (6 * 8)
        for path in sorted((trained / "results").glob("*/heldout.parquet"))
    ]
    assert table["both", "heldout", 1] == pytest.approx(sum(correct) / 2)
    assert table["first", "heldout", 1] == pytest.approx(correct[0])
    assert_plot_written(tmp_path, "pass_at_k")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["curves", "runs"], "runs has to be NAME=FOLDER"),
        (["curves", "a=/nowhere"], "a: there is no folder /nowhere"),
        (["curves", "a={empty}"], "a: there is no run with TensorBoard events"),
        (["curves", "a={empty}", "a={empty}"], "the name a is given twice"),
        (["pass_at_k", "a={empty}"], "a: there are no evaluation results"),
        (["curves", "a={runs}", "--tags", "rollout/nothing"], "no run has the tag rollout/nothing"),
    ],
)
def test_missing_runs_results_and_tags_are_refused(
    args: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "runs": trained}
    args = [word.format(**places) for word in args]
    assert main([*args, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


def run_analysis(name: str, trained: Path, out: Path, *flags: str) -> int:
    checkpoint = trained / "seed-0" / "last-digit" / "rlrt-0" / "checkpoints" / "last.ckpt"
    args = [name, f"--config={ROOT / 'configs' / 'rlrt.yaml'}", f"--ckpt_path={checkpoint}", f"--out={out}", *flags]
    return main([*args, "--trainer.logger=false", "--trainer.enable_progress_bar=false"])


def test_shift_writes_a_table_a_summary_and_a_plot(trained: Path, tmp_path: Path) -> None:
    assert run_analysis("shift", trained, tmp_path, "--limit=5") == 0
    table = pyarrow.parquet.read_table(tmp_path / "shift.parquet").to_pylist()
    assert len({(row["problem"], row["sample"]) for row in table}) == 5 * 2
    assert all(0 <= row["js"] <= math.log(2) + 1e-6 and 0 <= row["base_probability"] <= 1 for row in table)
    assert any(row["js"] > 0 for row in table), "the checkpoint's weights, not the initial ones"
    assert float({r["figure"]: r["value"] for r in rows(tmp_path / "shift_summary.csv")}["positions"]) == len(table)
    assert_plot_written(tmp_path, "shift")


def test_shift_requires_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["shift", f"--config={ROOT / 'configs' / 'rlrt.yaml'}", "--trainer.logger=false"]) == 2
    assert "set --ckpt_path" in capfd.readouterr().err


@pytest.mark.parametrize("text", slow_except(["", "carefully"], "carefully"))
def test_reflection_inserts_the_text_at_positions_ordered_by_kl(text: str, trained: Path, tmp_path: Path) -> None:
    flags = ("--limit=40", f"--text={text}", "--continuations=2", "--context=solution")
    assert run_analysis("reflection", trained, tmp_path, *flags) == 0
    table = rows(tmp_path / "reflection.csv")
    places = {(r["problem"], r["sample"]) for r in table}
    texts = {text, ""}
    assert {r["text"] for r in table} == texts
    assert len(table) == len(places) * 3 * len(texts) * 2
    for key in places:
        kl = {r["where"]: float(r["kl"]) for r in table if (r["problem"], r["sample"]) == key}
        assert kl["largest"] >= kl["random"] >= kl["smallest"] >= -1e-6
    assert {r["flipped"] for r in table} == {"True", "False"}
    summary = rows(tmp_path / "reflection_summary.csv")
    hard = {(r["text"], r["where"]): float(r["flipped"]) for r in summary if r["kind"] == "hard"}
    if text:  # the careful way, inserted where the policy chooses one, solves problems that it could not
        assert hard[text, "largest"] > hard["", "largest"]
    assert_plot_written(tmp_path, "reflection")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text=Wait, let me reconsider.",), "which the tokenizer cannot encode"),
        (("--text=", "--benchmark=nothing"), "benchmark is nothing; it has to be one of heldout, longer"),
        (("--text=", "--limit=1", "--samples=2"), "no rollout can be cut"),
    ],
)
def test_reflection_refuses_invalid_settings(
    flags: tuple[str, ...], message: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_analysis("reflection", trained, tmp_path, *flags) == 2
    assert message in capfd.readouterr().err


def test_styles_differ_in_colour_line_and_marker() -> None:
    from rlrt_lightning.analysis.plots import STYLES

    for field in range(4):
        values = [str(style[field]) for style in STYLES]
        assert len(set(values)) == len(STYLES)
    grey = [sum(int(s.color[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.59), (5, 0.11))) for s in STYLES[:3]]
    assert all(abs(a - b) > 8 for a, b in itertools.combinations(grey, 2)), "in black and white too"

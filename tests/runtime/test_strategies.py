"""Training is the same on one process, with DDP and FSDP2 on two, and with hybrid sharding (two replicas of two shards)
on four; failures of one rank end the run."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlrt_lightning.__main__ import main
from rlrt_lightning.policy.model import EMBEDDED
from tests.helpers.command_line import SMALL, runs_in, scalars
from tests.helpers.forks import Fork, fork
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT, run_cli
from tests.helpers.tiny import half_checkpoint

STRATEGIES = ["ddp", "fsdp2"]
RANKS = {"ddp": 2, "fsdp2": 2, "hybrid": 4}
COMPARED = ["plain", "lora", "lora_frozen", "ema", "copied", "srpo", "antisd", "rlcsd", "one_sided", "passes"]
COMPARED += ["rounds", "gspo", "cispo", "gathered"]
OTHERS = ["one_pass", "bf16", "bf16_true", "half_base", "saved", "exported_adapter"]
IN_CI = ["plain", "ema", "saved", "rounds", "bf16"]
"""The runs that the tests compare that are not marked as slow."""
HYBRID = ["plain", "ema", "lora", "copied", "one_sided", "bf16", "saved", "saved_whole"]
LOADED = ["ema", "lora", "lora_frozen", "copied", "bf16", "bf16_true", "half_base"]
"""The runs that are repeated with ranks that load the whole model."""
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
STORES: list[torch.distributed.TCPStore] = []
"""The rendezvous store of each run, as torchrun has one: this process chooses the port and keeps it."""


def start(ranks: int, *args: str) -> list[Fork]:
    """Starts each rank as a separate process, so no launcher ends one rank when another fails."""
    env = {}
    if ranks > 1:
        STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        env |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(STORES[-1].port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    return [fork(Path.cwd(), args, {**env, **more}) for more in own]


def finish(processes: list[Fork]) -> list[tuple[int, str]]:
    """Waits for the processes; the exit code and stderr of each rank."""
    return [(process.wait(), process.stderr.read_text()) for process in processes]


def run_ranks(ranks: int, *args: str) -> None:
    """Runs all ranks, which must succeed."""
    for code, err in finish(start(ranks, *args)):
        assert code == 0, err[-3000:]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs what the selected tests compare; the folder of each strategy's runs."""
    folders = {strategy: tmp_path_factory.mktemp(strategy) for strategy in ["one", *RANKS]}
    every = any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items)
    names = [*COMPARED, *OTHERS] if every else IN_CI
    for folder in folders.values():
        half_checkpoint(folder / "half")
    run_ranks(1, "one", str(folders["one"]), *names)
    run_ranks(2, "ddp", str(folders["ddp"]), *names)
    loaded = [f"{name}_loaded_whole" for name in LOADED if every or name in IN_CI]
    run_ranks(2, "fsdp2", str(folders["fsdp2"]), *names, *loaded, *(["saved_whole"] if every else []))
    run_ranks(4, "hybrid", str(folders["hybrid"]), *(HYBRID if every else ["ema"]))
    return folders


def recorded(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def comparable_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Leaves out times, speeds, and quantiles, which are averaged over ranks."""
    return {
        tag: value for tag, value in metrics.items() if not re.match(r"time/|speed/|signal/asymmetry_\w+_p\d\d", tag)
    }


@pytest.mark.parametrize(
    ("strategy", "name"),
    slow_except(
        [(strategy, name) for strategy in STRATEGIES for name in COMPARED]
        + [("hybrid", name) for name in HYBRID if name in COMPARED],
        *((strategy, name) for strategy in STRATEGIES for name in IN_CI),
        ("hybrid", "ema"),
    ),
)
def test_several_ranks_train_the_same_as_one(runs: dict[str, Path], strategy: str, name: str) -> None:
    """In every logged metric, gradient and weight, even if one rank has nothing to learn from (`one_sided`)."""
    one, two = recorded(runs["one"], name), recorded(runs[strategy], name)
    mine = [one["rollouts"][0][4 * problem + k] for problem in range(0, 8, RANKS[strategy]) for k in range(4)]
    assert two["rollouts"][0] == mine, "the first of N ranks has every Nth problem with its whole group"
    for of_one, of_two in zip(one["metrics"], two["metrics"], strict=True):
        assert comparable_metrics(of_two) == pytest.approx(comparable_metrics(of_one), rel=1e-5, abs=1e-6)
    for of_one, of_two in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(of_two, of_one, **CLOSE)
    torch.testing.assert_close(two["weights"], one["weights"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", *STRATEGIES])
def test_gradients_do_not_depend_on_tokens_per_pass(runs: dict[str, Path], strategy: str) -> None:
    """With long prompts beside short ones, compared with one pass per optimizer step; ranks take equally many."""
    whole, cut = recorded(runs["one"], "one_pass"), recorded(runs[strategy], "passes")
    assert whole["passes"] == [1, 1]
    assert min(cut["passes"]) > 1
    assert cut["passes"] != recorded(runs["one"], "passes")["passes"] or strategy == "one", "each has fewer rollouts"
    for of_whole, of_cut in zip(whole["gradients"], cut["gradients"], strict=True):
        assert max(float(g.abs().max()) for g in of_whole.values()) > 0.01
        torch.testing.assert_close(of_cut, of_whole, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_compared_runs_learn_and_evaluate(runs: dict[str, Path]) -> None:
    plain, ema, sided = (recorded(runs["one"], name) for name in ("plain", "ema", "one_sided"))
    assert any(g.abs().max() > 1e-3 for g in plain["gradients"][0].values())
    start = AutoModelForCausalLM.from_pretrained(EMBEDDED).state_dict()
    assert not torch.allclose(plain["weights"]["model.norm.weight"], start["model.norm.weight"])
    assert "eval/heldout/avg@2" in plain["metrics"][1]
    assert plain["metrics"][0]["signal/context"] > 0
    assert ema["teacher"][1], "the averaged teacher scored the second epoch"
    assert 0 < sided["metrics"][0]["groups/mixed"] <= 0.5
    antisd, rlcsd = (recorded(runs["one"], name)["metrics"] for name in ("antisd", "rlcsd"))
    assert [epoch["signal/gate_entropy"] > 0 for epoch in antisd] == [True, True]
    assert antisd[0]["signal/gate_open"] == 0
    assert 0 < rlcsd[0]["signal/selected"] < 1


@pytest.mark.parametrize("name", slow_except(["plain", "ema", "lora"], *IN_CI))
def test_each_of_two_sharded_ranks_holds_half_of_the_parameters(runs: dict[str, Path], name: str) -> None:
    (whole,) = recorded(runs["one"], name)["held"]
    held = recorded(runs["fsdp2"], name)["held"]
    assert sum(held) == whole
    assert max(held) < 0.51 * whole, "a tensor with an odd number of rows is not halved exactly"


@pytest.mark.slow
def test_with_adapters_a_frozen_teacher_copies_nothing_and_others_only_adapters(runs: dict[str, Path]) -> None:
    frozen, follows = (recorded(runs["one"], name) for name in ("lora_frozen", "lora"))
    adapters = sum(w.numel() for n, w in follows["weights"].items() if ".lora_" in n)
    assert follows["held"] == [frozen["held"][0] + adapters]
    assert frozen["teacher"][1], "it scored after the adapters had changed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "name"),
    [(strategy, "bf16") for strategy in RANKS]
    + [(strategy, name) for strategy in STRATEGIES for name in ("bf16_true", "half_base")],
)
def test_bf16_training_on_several_ranks_stays_close_to_one_rank(
    runs: dict[str, Path], strategy: str, name: str
) -> None:
    """Adapters are float32 unless the trainer converts all weights."""
    one, two = recorded(runs["one"], name), recorded(runs[strategy], name)
    assert two["metrics"][0]["train/loss"] == pytest.approx(one["metrics"][0]["train/loss"], rel=0.1)
    assert two["metrics"][0]["train/grad_norm"] == pytest.approx(one["metrics"][0]["train/grad_norm"], rel=0.1)
    adapters, others = ([w.dtype for n, w in two["weights"].items() if (".lora_" in n) == is_one] for is_one in (1, 0))
    assert set(adapters) <= {torch.bfloat16 if name == "bf16_true" else torch.float32}
    assert set(others) == {torch.float32 if name == "bf16" else torch.bfloat16}


@pytest.mark.parametrize("name", slow_except(LOADED, *IN_CI))
def test_reading_only_shards_changes_no_bit(runs: dict[str, Path], name: str) -> None:
    """In rollouts, teacher scores, metrics, gradients and weights, compared with loading the whole model first."""
    shards, whole = (recorded(runs["fsdp2"], run) for run in (name, f"{name}_loaded_whole"))
    assert sum(map(len, shards["read"])) > 0
    assert sum(map(len, whole["read"])) == 0
    assert shards["rollouts"] == whole["rollouts"]
    for ours, theirs in zip(shards["metrics"], whole["metrics"], strict=True):
        assert comparable_metrics(ours) == comparable_metrics(theirs)
    for part in ("teacher", "gradients", "weights"):
        torch.testing.assert_close(shards[part], whole[part], rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["one", *STRATEGIES])
def test_the_estimated_memory_is_that_of_each_ranks_tensors(runs: dict[str, Path], strategy: str) -> None:
    """In float32, with Adam; its counts of steps are a few bytes more."""
    seen = recorded(runs[strategy], "plain")
    for found, weights in zip(seen["estimated"], seen["held"], strict=True):
        assert found["weights"] == found["gradients"] == 4 * weights
        assert found["optimizer state"] == pytest.approx(8 * weights, rel=0.001)
        assert found["gradient buckets"] == (4 * weights if strategy == "ddp" else 0)


def test_each_of_two_replicas_holds_and_reads_all_parameters_once(runs: dict[str, Path]) -> None:
    (whole,) = recorded(runs["one"], "ema")["held"]
    seen = recorded(runs["hybrid"], "ema")
    held = seen["held"]
    assert held[0] + held[1] == held[2] + held[3] == whole
    assert max(held) < 0.51 * whole
    for read, shards in zip(seen["read"], seen["shards"], strict=True):
        assert sorted(read) == sorted(shards)


def test_a_size_that_does_not_divide_the_ranks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--config={ROOT / 'configs/rlrt.yaml'}", *SMALL, f"--trainer.logger.save_dir={tmp_path}"]
    strategy = ["--trainer.strategy=FSDP2Strategy", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    for size, why in ((2, "does not divide the number of ranks, 1"), (0, "has to be at least 1, or null")):
        assert main(["fit", *args, *strategy, f"--trainer.strategy.dp_shard_size={size}"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"FSDP2Strategy.dp_shard_size is {size}" in error
        assert why in error


def test_each_rank_reads_its_shards_and_nothing_else(runs: dict[str, Path]) -> None:
    """One slice for each shard: a teacher with its own weights copies the shards in memory."""
    seen = recorded(runs["fsdp2"], "ema")
    for read, shards in zip(seen["read"], seen["shards"], strict=True):
        assert sorted(read) == sorted(shards)


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_by", "ranks", "resumed_by"),
    [
        ("fsdp2/saved", 2, "fsdp2"),
        pytest.param("ddp/saved", 1, "one", marks=pytest.mark.slow),
        pytest.param("ddp/saved", 2, "ddp", marks=pytest.mark.slow),
        pytest.param("ddp/saved", 2, "fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved", 1, "fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved_whole", 1, "one", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved_whole", 2, "fsdp2", marks=pytest.mark.slow),
        pytest.param("hybrid/saved", 1, "fsdp2", marks=pytest.mark.slow),
        pytest.param("hybrid/saved", 4, "hybrid", marks=pytest.mark.slow),
        pytest.param("hybrid/saved_whole", 1, "one", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved", 4, "hybrid", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_resumes_with_another_strategy_and_number_of_ranks(
    runs: dict[str, Path], tmp_path: Path, saved_by: str, ranks: int, resumed_by: str
) -> None:
    strategy, name = saved_by.split("/")
    checkpoint = runs[strategy] / f"{name}.ckpt"
    assert checkpoint.is_dir() == (saved_by in ("fsdp2/saved", "hybrid/saved"))
    run_ranks(ranks, resumed_by, str(tmp_path), f"resumed:after:{checkpoint}")
    uninterrupted, resumed = recorded(runs["one"], "ema"), recorded(tmp_path, "after")
    got = comparable_metrics(resumed["metrics"][0])
    expected = {tag: uninterrupted["metrics"][1][tag] for tag in got}
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "train/loss" in got
    torch.testing.assert_close(resumed["weights"], uninterrupted["weights"], **CLOSE)


def test_a_sharded_checkpoint_is_refused_without_fsdp(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [f"--config={ROOT / 'configs/rlrt.yaml'}", *SMALL, f"--trainer.logger.save_dir={tmp_path}"]
    assert main(["fit", *args, f"--ckpt_path={runs['fsdp2'] / 'saved.ckpt'}"]) == 2
    assert "load it with --trainer.strategy=fsdp2" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", slow_except(["one", *RANKS], "one", *STRATEGIES))
def test_the_export_equals_the_trained_weights(runs: dict[str, Path], strategy: str) -> None:
    trained = recorded(runs[strategy], "plain")["weights"]
    loaded = AutoModelForCausalLM.from_pretrained(runs[strategy] / "exported")
    assert loaded.config.architectures == [type(loaded).__name__]
    torch.testing.assert_close(dict(loaded.named_parameters()), trained, check_device=False)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", *STRATEGIES])
def test_exported_adapters_load_in_peft(runs: dict[str, Path], strategy: str) -> None:
    folder = runs[strategy] / "exported_adapter"
    assert not (folder / "model.safetensors").exists()
    trained = recorded(runs[strategy], "exported_adapter")["weights"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), folder)
    got = {n.removeprefix("base_model.model."): p for n, p in loaded.named_parameters()}
    torch.testing.assert_close(got, trained)
    assert any(w.abs().max() > 0 for n, w in trained.items() if ".lora_B." in n)


# -- the command line ----------------------------------------------------------------------------------------------


def test_an_evaluation_on_two_ranks_gives_the_same_results_as_on_one(tmp_path: Path) -> None:
    """The 3 problems of `longer` do not divide evenly: the second rank takes one batch of one problem."""
    flags = [f"--config={ROOT / 'configs/rlrt.yaml'}", *SMALL, "--data.eval_prompts=2", "--trainer.accelerator=cpu"]
    flags.append("--data.sampling.max_new_tokens=12")
    one, two = (
        ["validate", *flags, f"--evaluation.results={tmp_path / name}", f"--trainer.logger.save_dir={tmp_path / name}"]
        for name in ("one", "two")
    )
    assert main(one) == 0
    run_ranks(2, "command_line", *two, "--trainer.strategy=ddp", "--trainer.devices=2")
    for name in ("heldout.parquet", "longer.parquet", "pass_at_k.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    expected, logged = (
        {tag: curve for tag, curve in scalars(tmp_path / name).items() if tag.startswith("eval/")}
        for name in ("one", "two")
    )
    assert logged.keys() == expected.keys() != set()
    for tag, curve in logged.items():
        assert curve[0][1] == pytest.approx(expected[tag][0][1], rel=1e-5), tag


@pytest.mark.slow
def test_fsdp_from_the_command_line_trains_resumes_and_evaluates(tmp_path: Path) -> None:
    """Training with validation, pictures and checkpoints, a resume from `last`, then an evaluation."""
    folder = tmp_path / "two"
    flags = ["--trainer.strategy=fsdp", "--trainer.devices=2", "--trainer.accelerator=cpu", *SMALL]
    args = [f"--config={ROOT / 'configs/rlrt.yaml'}", *flags, f"--trainer.logger.save_dir={folder}"]
    for command in (
        ["fit", *args, "--trainer.max_epochs=2"],
        ["fit", *args, "--trainer.max_epochs=3", "--ckpt_path=last"],
        ["validate", *args, "--ckpt_path=last"],
    ):
        run_cli(*command, timeout=200)
    one = tmp_path / "one"
    single = [w for w in args if "trainer.devices" not in w and "strategy" not in w and "save_dir" not in w]
    assert main(["fit", *single, f"--trainer.logger.save_dir={one}", "--trainer.max_epochs=3"]) == 0
    expected, got = scalars(one), scalars(folder)
    for tag in ("rollout/reward", "labels/guess", "signal/context", "train/grad_norm", "eval/heldout/avg@8"):
        # The ranks sum gradients in another order.
        assert got[tag][0] == pytest.approx(expected[tag][0], rel=1e-4 if tag == "train/grad_norm" else 1e-6), tag
    assert got["rollout/reward"][2] == pytest.approx(expected["rollout/reward"][2])
    assert (folder / "last-digit" / "rlrt-0" / "signal" / "epoch-1.html").exists()
    assert (folder / "last-digit" / "rlrt-0" / "evaluation" / "step-6" / "pass_at_k.csv").exists()
    assert runs_in(folder) == [folder / "last-digit" / "rlrt-0"], "both ranks agree on the folder"


def test_a_strategy_that_would_break_rollouts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--config={ROOT / 'configs/rlrt.yaml'}", *SMALL, f"--trainer.logger.save_dir={tmp_path}"]
    strategy = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
    assert main(["fit", *args, strategy, "--trainer.accelerator=cpu", "--trainer.devices=1"]) == 2
    assert "ModelParallelStrategy is not supported; use ddp" in capsys.readouterr().err


# -- stopped and failed ranks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stop_signal_to_one_rank_makes_all_ranks_save_and_stop(runs: dict[str, Path], tmp_path: Path) -> None:
    """During the updates, when each rank has micro-batches of its own left."""
    (first, stderr), (second, _) = finish(start(2, "fsdp2", str(tmp_path), "stops"))
    assert (first, second) == (143, 0)
    saved = tmp_path / "stops" / "checkpoints" / "last.ckpt"
    assert f"saved after 3 optimizer steps as {saved}; resume with --ckpt_path last" in stderr
    run_ranks(2, "fsdp2", str(tmp_path), f"resumed:after:{saved}")
    uninterrupted, resumed = recorded(runs["one"], "ema"), recorded(tmp_path, "after")
    assert len(resumed["gradients"]) == 1
    assert comparable_metrics(resumed["metrics"][0]) == pytest.approx(
        comparable_metrics({tag: uninterrupted["metrics"][1][tag] for tag in resumed["metrics"][0]}), rel=1e-5, abs=1e-6
    )
    torch.testing.assert_close(resumed["weights"], uninterrupted["weights"], **CLOSE)


def test_when_a_rank_fails_the_others_stop_and_report_the_cause(tmp_path: Path) -> None:
    (first, stderr), (second, own) = finish(start(2, "ddp", str(tmp_path), "fails"))
    assert first != 0
    assert second == 1
    assert "on fire" in own
    assert "rank 1 has failed (ValueError: the disk of the second rank is on fire)" in stderr


@pytest.mark.slow
def test_when_a_rank_is_killed_the_others_stop_and_name_it(tmp_path: Path) -> None:
    (first, stderr), (second, _) = finish(start(2, "fsdp2", str(tmp_path), "dies"))
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL)
    assert re.search("rank 1 (does|did) not respond", stderr)
    assert "--ckpt_path last" in stderr


@pytest.mark.slow
def test_when_a_rank_hangs_the_others_stop_after_the_timeout(tmp_path: Path) -> None:
    processes = start(2, "ddp", str(tmp_path), "hangs")
    code, stderr = finish(processes[:1])[0]
    processes[1].process.kill()
    finish(processes[1:])
    assert code == 3
    assert "rank 1 did not respond for 10 s" in stderr

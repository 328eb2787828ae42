"""One process, DDP and FSDP2 on two: the same training, and what happens when a rank fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlrt_lightning.__main__ import main
from rlrt_lightning.policy.model import EMBEDDED
from tests.helpers.command_line import SMALL, scalars
from tests.helpers.marks import in_part
from tests.helpers.processes import ROOT, run_cli

STRATEGIES = ["ddp", "fsdp2"]
COMPARED = ["plain", "lora", "lora_frozen", "ema", "copied", "srpo", "one_sided"]
OTHERS = ["bf16", "bf16_true", "saved", "exported", "exported_adapter"]
IN_CI = ["plain", "ema", "saved", "exported"]
"""What the tests compare that are not marked as slow."""
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
MEETINGS: list[torch.distributed.TCPStore] = []
"""Where the ranks of each run meet, as those of torchrun do: the port is chosen and kept by this process."""


def start(ranks: int, *words: str) -> list[subprocess.Popen[str]]:
    """Starts each rank by itself, so that nobody but us ends the one when the other does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if ranks > 1:
        MEETINGS.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        env |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(MEETINGS[-1].port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.on_ranks", *words],
            cwd=ROOT,
            env={**env, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 200) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank."""
    try:
        return [(p.returncode, err) for p in processes for _, err in [p.communicate(timeout=timeout)]]
    finally:
        for p in processes:
            p.kill()


def complete(ranks: int, *words: str) -> None:
    for code, err in finish(start(ranks, *words)):
        assert code == 0, err[-3000:]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of runs for each strategy: those that the selected tests compare."""
    folders = {strategy: tmp_path_factory.mktemp(strategy) for strategy in ["one", *STRATEGIES]}
    every = any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items)
    names = [*COMPARED, *OTHERS] if every else IN_CI
    complete(1, "one", str(folders["one"]), *names)
    complete(2, "ddp", str(folders["ddp"]), *names)
    complete(2, "fsdp2", str(folders["fsdp2"]), *names, *(["saved_whole"] if every else []))
    return folders


def seen(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def of_training(figures: dict[str, float]) -> dict[str, float]:
    """Without times and speeds, and quantiles, which are averaged over ranks."""
    return {
        tag: value for tag, value in figures.items() if not re.match(r"time/|speed/|signal/asymmetry_\w+_p\d\d", tag)
    }


@pytest.mark.parametrize("name", in_part(COMPARED, *IN_CI))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_does(runs: dict[str, Path], strategy: str, name: str) -> None:
    """Every logged figure, gradient and weight; also where one rank has nothing to learn from (`one_sided`)."""
    one, two = seen(runs["one"], name), seen(runs[strategy], name)
    mine = [one["rollouts"][0][4 * problem + k] for problem in range(0, 8, 2) for k in range(4)]
    assert two["rollouts"][0] == mine, "the first rank has every second problem, its group whole"
    for of_one, of_two in zip(one["figures"], two["figures"], strict=True):
        assert of_training(of_two) == pytest.approx(of_training(of_one), rel=1e-5, abs=1e-6)
    for of_one, of_two in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(of_two, of_one, **CLOSE)
    torch.testing.assert_close(two["weights"], one["weights"], **CLOSE)


@pytest.mark.slow
def test_the_runs_that_are_compared_do_something(runs: dict[str, Path]) -> None:
    plain, ema, sided = (seen(runs["one"], name) for name in ("plain", "ema", "one_sided"))
    assert any(g.abs().max() > 1e-3 for g in plain["gradients"][0].values())
    start = AutoModelForCausalLM.from_pretrained(EMBEDDED).state_dict()
    assert not torch.allclose(plain["weights"]["model.norm.weight"], start["model.norm.weight"])
    assert "eval/heldout/avg@2" in plain["figures"][1]
    assert plain["figures"][0]["signal/context"] > 0
    assert ema["teacher"][1], "the averaged teacher scored the second epoch"
    assert 0 < sided["figures"][0]["groups/mixed"] <= 0.5


@pytest.mark.parametrize("name", in_part(["plain", "ema", "lora"], *IN_CI))
def test_sharded_ranks_hold_half_each(runs: dict[str, Path], name: str) -> None:
    assert 2 * seen(runs["fsdp2"], name)["held"] == seen(runs["one"], name)["held"]


@pytest.mark.slow
def test_with_adapters_a_frozen_teacher_needs_no_copy_and_another_one_theirs_alone(runs: dict[str, Path]) -> None:
    frozen, follows = (seen(runs["one"], name) for name in ("lora_frozen", "lora"))
    adapters = sum(w.numel() for n, w in follows["weights"].items() if ".lora_" in n)
    assert follows["held"] == frozen["held"] + adapters
    assert frozen["teacher"][1], "it scored after the adapters had changed"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.float32), ("bf16_true", torch.bfloat16)])
def test_bf16_stays_near(runs: dict[str, Path], strategy: str, name: str, dtype: torch.dtype) -> None:
    one, two = seen(runs["one"], name), seen(runs[strategy], name)
    assert two["figures"][0]["train/loss"] == pytest.approx(one["figures"][0]["train/loss"], rel=0.1)
    assert two["figures"][0]["train/grad_norm"] == pytest.approx(one["figures"][0]["train/grad_norm"], rel=0.1)
    assert all(w.dtype == dtype for w in two["weights"].values())


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_by", "ranks", "resumed_by"),
    [
        ("ddp/saved", 1, "one"),
        ("fsdp2/saved", 2, "fsdp2"),
        pytest.param("ddp/saved", 2, "ddp", marks=pytest.mark.slow),
        pytest.param("ddp/saved", 2, "fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved", 1, "fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved_whole", 1, "one", marks=pytest.mark.slow),
        pytest.param("fsdp2/saved_whole", 2, "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_under_another_strategy_and_number_of_ranks(
    runs: dict[str, Path], tmp_path: Path, saved_by: str, ranks: int, resumed_by: str
) -> None:
    strategy, name = saved_by.split("/")
    checkpoint = runs[strategy] / f"{name}.ckpt"
    assert checkpoint.is_dir() == (saved_by == "fsdp2/saved")
    complete(ranks, resumed_by, str(tmp_path), f"resumed:after:{checkpoint}")
    undisturbed, resumed = seen(runs["one"], "ema"), seen(tmp_path, "after")
    got = of_training(resumed["figures"][0])
    expected = {tag: undisturbed["figures"][1][tag] for tag in got}
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "train/loss" in got
    torch.testing.assert_close(resumed["weights"], undisturbed["weights"], **CLOSE)


def test_shards_are_not_loaded_by_a_strategy_that_cannot(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--config={ROOT / 'configs/rlrt.yaml'}", *SMALL, f"--trainer.logger.save_dir={tmp_path}"]
    assert main(["fit", *words, f"--ckpt_path={runs['fsdp2'] / 'saved.ckpt'}"]) == 2
    assert "load it with --trainer.strategy=fsdp2" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["one", *STRATEGIES])
def test_what_is_exported_is_what_was_trained(runs: dict[str, Path], strategy: str) -> None:
    trained = seen(runs[strategy], "exported")["weights"]
    loaded = AutoModelForCausalLM.from_pretrained(runs[strategy] / "exported")
    assert loaded.config.architectures == [type(loaded).__name__]
    torch.testing.assert_close(dict(loaded.named_parameters()), trained, check_device=False)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", *STRATEGIES])
def test_adapters_are_exported_for_peft(runs: dict[str, Path], strategy: str) -> None:
    folder = runs[strategy] / "exported_adapter"
    assert not (folder / "model.safetensors").exists()
    trained = seen(runs[strategy], "exported_adapter")["weights"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), folder)
    got = {n.removeprefix("base_model.model."): p for n, p in loaded.named_parameters()}
    torch.testing.assert_close(got, trained)
    assert any(w.abs().max() > 0 for n, w in trained.items() if ".lora_B." in n)


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp_by_flag(tmp_path: Path) -> None:
    """The whole way: training, validation, pictures and checkpoints, resumed by `last`, then an evaluation."""
    folder = tmp_path / "two"
    flags = ["--trainer.strategy=fsdp", "--trainer.devices=2", "--trainer.accelerator=cpu", *SMALL]
    words = [f"--config={ROOT / 'configs/rlrt.yaml'}", *flags, f"--trainer.logger.save_dir={folder}"]
    for command in (
        ["fit", *words, "--trainer.max_epochs=2"],
        ["fit", *words, "--trainer.max_epochs=3", "--ckpt_path=last"],
        ["validate", *words, "--ckpt_path=last"],
    ):
        run_cli(*command, timeout=200)
    one = tmp_path / "one"
    single = [w for w in words if "trainer.devices" not in w and "strategy" not in w and "save_dir" not in w]
    assert main(["fit", *single, f"--trainer.logger.save_dir={one}", "--trainer.max_epochs=3"]) == 0
    expected, got = scalars(one), scalars(folder) | {"resumed": scalars(folder, 1)["rollout/reward"]}
    for tag in ("rollout/reward", "labels/direct", "signal/context", "train/grad_norm", "eval/heldout/avg@8"):
        assert got[tag][0] == pytest.approx(expected[tag][0]), tag
    assert got["resumed"][0] == pytest.approx(expected["rollout/reward"][2])
    assert (folder / "rlrt" / "version_0" / "signal" / "epoch-0.html").exists()
    assert (folder / "rlrt" / "version_2" / "evaluation" / "pass_at_k.csv").exists()


def test_a_strategy_under_which_roll_outs_would_go_wrong_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--config={ROOT / 'configs/rlrt.yaml'}", *SMALL, f"--trainer.logger.save_dir={tmp_path}"]
    strategy = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
    assert main(["fit", *words, strategy, "--trainer.accelerator=cpu", "--trainer.devices=1"]) == 2
    assert "ModelParallelStrategy is not supported; use ddp" in capsys.readouterr().err


# -- a rank that is asked to end, or fails -------------------------------------------------------------------------


@pytest.mark.slow
def test_when_a_rank_is_asked_to_end_all_save_and_end(runs: dict[str, Path], tmp_path: Path) -> None:
    """In the middle of the updates, of which each rank has its own left."""
    (first, said), (second, _) = finish(start(2, "fsdp2", str(tmp_path), "stops"))
    assert (first, second) == (143, 0)
    saved = tmp_path / "stops" / "checkpoints" / "last.ckpt"
    assert f"saved after 3 optimizer steps as {saved}; resume with --ckpt_path last" in said
    complete(2, "fsdp2", str(tmp_path), f"resumed:after:{saved}")
    undisturbed, resumed = seen(runs["one"], "ema"), seen(tmp_path, "after")
    assert len(resumed["gradients"]) == 1
    assert of_training(resumed["figures"][0]) == pytest.approx(
        of_training({tag: undisturbed["figures"][1][tag] for tag in resumed["figures"][0]}), rel=1e-5, abs=1e-6
    )
    torch.testing.assert_close(resumed["weights"], undisturbed["weights"], **CLOSE)


def test_when_a_rank_fails_the_others_end_and_say_why(tmp_path: Path) -> None:
    (first, said), (second, own) = finish(start(2, "ddp", str(tmp_path), "fails"))
    assert first != 0
    assert second == 1
    assert "on fire" in own
    assert "rank 1 has failed (ValueError: the disk of the second rank is on fire)" in said


@pytest.mark.slow
def test_when_a_rank_is_killed_the_others_end_and_say_so(tmp_path: Path) -> None:
    (first, said), (second, _) = finish(start(2, "fsdp2", str(tmp_path), "dies"))
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL)
    assert re.search("rank 1 (does|did) not respond", said)
    assert "--ckpt_path last" in said


@pytest.mark.slow
def test_when_a_rank_hangs_the_others_end_within_the_time_limit(tmp_path: Path) -> None:
    processes = start(2, "ddp", str(tmp_path), "hangs")
    code, said = finish(processes[:1])[0]
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].communicate()
    assert code == 3
    assert "rank 1 did not respond for 10 s" in said

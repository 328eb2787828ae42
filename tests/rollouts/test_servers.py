"""Several vLLM servers, with stand-ins that compute with a policy of their own: which weights they have."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrt_lightning import LastDigit, LoRA, Policy, Rollout, Sampling, VllmServerEngine
from rlrt_lightning.rollouts.vllm_client import MAX_UNKNOWN, Server, Target, UnknownAdapters
from rlrt_lightning.rollouts.vllm_common import EngineError
from tests.helpers.fake_vllm import FakeVllm, serve_by
from tests.helpers.marks import slow_except

URLS = [f"http://127.0.0.1:{port}" for port in (8001, 8002, 8003)]
ADAPTERS = LoRA(rank=2)
LOADING = {"all weights": "/collective_rpc", "adapters": "/v1/load_lora_adapter"}


def policy_with(sends: str) -> Policy:
    made = Policy(lora=ADAPTERS if sends == "adapters" else None)
    made.load()
    return made


def update(policy: Policy, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(1e-3 * torch.randn(weight.shape, generator=g))


def draw(engine: VllmServerEngine, policy: Policy) -> list[Rollout]:
    prompts = [policy.encode_prompt(p.prompt) for p in LastDigit().problems("heldout")[:12]]
    return list(engine.generate(prompts, 1, Sampling(max_new_tokens=1), list(range(12))))


def servers(
    sends: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[VllmServerEngine, dict[str, FakeVllm]]:
    fakes = {url: FakeVllm(ADAPTERS if sends == "adapters" else None) for url in URLS}
    serve_by(fakes, monkeypatch)
    return VllmServerEngine(URLS, weights=str(folder / "weights"), patience_s=0.5, **settings), fakes


@pytest.mark.parametrize("sends", LOADING)
def test_the_weights_of_every_server_are_checked_after_every_sync(
    sends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, (engine, fakes) = policy_with(sends), servers(sends, tmp_path, monkeypatch)
    for epoch in range(3):
        update(policy, epoch)
        engine.sync(policy)
        assert len(draw(engine, policy)) == 12
        assert [fake.scored for fake in fakes.values()] == [12 * (epoch + 1)] * 3
    loads = [fake.calls.count("/collective_rpc") for fake in fakes.values()]
    assert loads == [1 if sends == "adapters" else 3] * 3, "the base weights are sent once"
    assert len(list((tmp_path / "weights").iterdir())) == (3 if sends == "adapters" else 1)
    assert all(len(fake.adapters) == (sends == "adapters") for fake in fakes.values())


@pytest.mark.parametrize(
    ("sends", "stale", "tolerance"),
    slow_except(
        [(sends, stale, tolerance) for sends in LOADING for stale in range(3) for tolerance in (None, 1.0)],
        ("adapters", 0, None),
        ("all weights", 2, 1.0),
    ),
)
def test_one_server_with_outdated_weights_is_detected(
    sends: str, stale: int, tolerance: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reports the new version, but did not load the weights."""
    policy, (engine, fakes) = policy_with(sends), servers(sends, tmp_path, monkeypatch, tolerance=tolerance)
    engine.sync(policy)
    assert len(draw(engine, policy)) == 12
    update(policy, 0)
    fakes[URLS[stale]].ignored = (LOADING[sends],)
    engine.sync(policy)
    with pytest.raises(EngineError, match=rf"after a sync {URLS[stale]} has outdated weights: .* changed by 0 nats"):
        draw(engine, policy)


@pytest.mark.parametrize("stale", range(3))
def test_one_server_that_never_loads_weights_is_detected_after_the_first_sync(
    stale: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, (engine, fakes) = policy_with("all weights"), servers("all weights", tmp_path, monkeypatch)
    update(policy, 0)
    fakes[URLS[stale]].ignored = (LOADING["all weights"],)
    engine.sync(policy)
    with pytest.raises(EngineError, match=rf"after a sync {URLS[stale]} has outdated weights: .* differ from"):
        draw(engine, policy)


def test_servers_that_refuse_adapters_get_merged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All servers, even if only one refuses, since they must sample from the same policy."""
    policy, (engine, fakes) = policy_with("adapters"), servers("all weights", tmp_path, monkeypatch)
    for fake in fakes.values():
        fake._load_adapters = lambda name, folder: None  # type: ignore[method-assign]
    fakes[URLS[1]].refused = ("/v1/load_lora_adapter",)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        for epoch in range(2):
            update(policy, epoch)
            engine.sync(policy)
            rollouts = draw(engine, policy)
            own = policy.score([(r.prompt_ids, r.response_ids) for r in rollouts])
            assert all(float((r.logp - logp).abs().max()) < 1e-4 for r, logp in zip(rollouts, own, strict=True))
    lines = [r.getMessage() for r in caplog.records if "merged into the weights" in r.getMessage()]
    assert len(lines) == 1
    assert "/v1/load_lora_adapter returned 500" in lines[0]
    assert "rlrt_lightning serve" in lines[0]


def test_few_requests_are_spread_over_all_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, (engine, fakes) = policy_with("all weights"), servers("all weights", tmp_path, monkeypatch)
    engine.sync(policy)
    draw(engine, policy)
    before = {url: fake.calls.count("/v1/completions") for url, fake in fakes.items()}
    engine.score([([3, 4], [5 + i]) for i in range(12)])
    assert all(fake.calls.count("/v1/completions") > before[url] for url, fake in fakes.items())


def server_with(answers: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with the target adapters that answers completions one after the other."""
    server = Server(URLS[0], 1.0, 1.0, 1)
    server.target = Target(folder / "1", folder / "2")

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if path == "/weight_info":
            return {"weight_version": "1+2"}
        assert path == "/v1/completions"
        assert body == {"prompt": [3], "model": "rlrt-2"}
        answer = answers.pop(0)
        if answer is None:
            raise UnknownAdapters("returned 404")
        return {"choices": [{"finish_reason": answer}]}

    monkeypatch.setattr(server, "_call", call)
    return server


def test_an_aborted_completion_is_requested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank aborts all requests of a server before it loads adapters."""
    server = server_with(["abort", None, "abort", "stop"], tmp_path, monkeypatch)
    assert server.complete({"prompt": [3]}, threading.Event())["choices"][0]["finish_reason"] == "stop"


def test_a_server_that_forgets_its_adapters_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_with([None] * (MAX_UNKNOWN + 1), tmp_path, monkeypatch)
    with pytest.raises(EngineError, match="returned 404"):
        server.complete({"prompt": [3]}, threading.Event())

"""Token log-probs, computed in chunks, match the model's own for any processing after the architecture's head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlrt_lightning import ConfigError, LoRA, Policy
from rlrt_lightning.policy.lora import TeacherAdapters
from rlrt_lightning.policy.padding import pad_sequences
from tests.helpers.tiny import ARCHITECTURES, tiny_policy

SEQUENCES = [([5, 6, 7], [8, 9, 1]), ([4], [10, 11, 12, 13, 1]), ([5, 9, 3, 2, 7, 8], [20])]


def plain_log_probs(model: torch.nn.Module, temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies from the full logits, one sequence at a time."""
    logps, entropies = [], []
    for prompt, response in SEQUENCES:
        ids = torch.tensor([prompt + response])
        logp = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
        logps.append(logp.gather(-1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return logps, entropies


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_entropy_and_gradients_match_the_plain_forward_pass(architecture: str) -> None:
    made = tiny_policy(architecture, logits_chunk=2)
    made.model.eval()
    logp, entropy = made.log_probs(*pad_sequences(SEQUENCES), temperature=0.7)
    (logp.sum() + 0.3 * entropy.sum()).backward()
    ours = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()

    expected, expected_entropy = plain_log_probs(made.model, 0.7)
    (torch.cat(expected).sum() + 0.3 * torch.cat(expected_entropy).sum()).backward()
    for row, (prompt, response) in enumerate(SEQUENCES):
        where = slice(len(prompt), len(prompt) + len(response))
        torch.testing.assert_close(logp[row, where], expected[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy[row, where], expected_entropy[row], rtol=1e-4, atol=1e-5)
    for name, p in made.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert ours


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_applied_in_chunks_for_common_architectures(architecture: str) -> None:
    assert tiny_policy(architecture)._applies_head


def test_an_unknown_head_falls_back_to_the_models_forward(caplog: pytest.LogCaptureFixture) -> None:
    made = tiny_policy()
    head = made.model.forward

    def odd(*args: object, **kwargs: object) -> object:
        out = head(*args, **kwargs)
        out.logits = out.logits * 0.5  # not visible in the model's config
        return out

    made.model.forward = odd
    made.adopt(made.model)
    assert "more memory" in caplog.text
    scores = made.score(SEQUENCES)
    expected, _ = plain_log_probs(made.model.eval(), 1.0)
    for got, want in zip(scores, expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_scores_do_not_depend_on_the_batch_size(tokens: int) -> None:
    made = tiny_policy(score_tokens=tokens)
    expected, _ = plain_log_probs(made.model.eval(), 1.0)
    for got, want in zip(made.score(SEQUENCES), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        made = Policy(gradient_checkpointing=checkpointing)
        made.load()
        made.log_probs(*pad_sequences(SEQUENCES))[0].sum().backward()
        grads.append([p.grad for p in made.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_prompts_use_the_chat_template_unless_chat_is_false() -> None:
    assert Policy().decode(Policy().encode_prompt("tea 4 milk 5")) == "tea 4 milk 5"
    special = Policy().tokenizer.convert_ids_to_tokens(Policy().encode_prompt("tea 4 milk 5"))
    assert special == ["<user>", "tea", " 4", " milk", " 5", "<assistant>"]
    assert Policy(chat=False).tokenizer.convert_ids_to_tokens(Policy(chat=False).encode_prompt("tea 4")) == [
        "tea",
        " 4",
    ]
    conversation = [{"role": "user", "content": "tea 1"}, {"role": "assistant", "content": "guess 1"}]
    tokens = Policy().tokenizer.convert_ids_to_tokens(Policy().encode_prompt([*conversation, conversation[0]]))
    assert "".join(tokens) == "<user>tea 1<assistant>guess 1<eos><user>tea 1<assistant>"


def test_an_invalid_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.policy.path: no model can be read at '.*nowhere'"):
        _ = Policy(path=str(tmp_path / "nowhere")).config
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="is a vit model, not a causal LM"):
        _ = Policy(path=str(tmp_path)).config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.policy\.path"):
        _ = Policy(path=str(tmp_path)).config
    with pytest.raises(ConfigError, match="logits_chunk"):
        Policy(logits_chunk=0)


def test_a_missing_chat_template_is_refused_at_once(tmp_path: Path) -> None:
    source = Policy()
    source.tokenizer.chat_template = None
    source.tokenizer.save_pretrained(tmp_path)
    source.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model.policy.chat is set, but .* has no chat template"):
        _ = Policy(path=str(tmp_path), chat=True).tokenizer
    assert Policy(path=str(tmp_path)).encode_prompt("a4") == Policy(chat=False).encode_prompt("a4")


def test_only_adapters_are_trained_and_they_merge_into_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made, plain = Policy(lora=LoRA(rank=4)), Policy()
    made.load()
    plain.load()
    trained = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    for got, want in zip(made.score(SEQUENCES), plain.score(SEQUENCES), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # new adapters have no effect
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    merged = dict(made.merged_weights())
    assert set(merged) == set(plain.model.state_dict())
    made.model.save_pretrained(tmp_path, state_dict=merged)
    plain.adopt(AutoModelForCausalLM.from_pretrained(tmp_path))
    for got, want in zip(made.score(SEQUENCES), plain.score(SEQUENCES), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    """In bfloat16 an optimizer step of 1e-5 would be rounded away."""
    made = Policy(dtype="bfloat16", lora=LoRA(rank=4))
    made.load()
    dtypes = {(".lora_" in name, p.dtype) for name, p in made.model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(torch.isfinite(logp).all() for logp in made.score(SEQUENCES))


def test_a_teacher_without_adapters_scores_exactly_as_the_initial_model() -> None:
    made, plain = Policy(lora=LoRA(rank=4)), Policy()
    made.load()
    plain.load()
    for p in made.model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    trained, requires = made.score(SEQUENCES), [p.requires_grad for p in made.model.parameters()]
    with TeacherAdapters(made.model, off=True).applied_to(made.model):
        assert [p.requires_grad for p in made.model.parameters()] == requires
        for got, want, other in zip(made.score(SEQUENCES), plain.score(SEQUENCES), trained, strict=True):
            assert torch.equal(got, want)
            assert not torch.equal(got, other)
    for got, want in zip(made.score(SEQUENCES), trained, strict=True):
        assert torch.equal(got, want)


def test_adapters_for_missing_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.policy\.lora: .*nothing_like_it"):
        Policy(lora=LoRA(targets=["nothing_like_it"])).load()

"""Work of one optimizer step in FLOP, counted without a clock: `python benchmarks/work.py` (two to three minutes).

Counts what a step computes after its rollouts were sampled: the teacher's scores, and forward and backward passes. The
step is the real one of each trainer, with rollouts from a list: --prompts prompts of --prompt-tokens tokens, with 8
rollouts of --tokens tokens each, half of them correct. `torch.utils.flop_counter` counts matmuls, and attention as its
kernel on a CPU computes it: without a mask only the pairs below the diagonal.

- ours: GRPO and RLRT; plain, with gradient checkpointing, and under FSDP2 (one process on a CPU)
- TRL's GRPO with as many micro-batches, if TRL is installed (`pip install -e '.[bench]'`). On a CPU its head computes
  the logits of the prompts too; its GPU kernel does not, so that this work is subtracted for a row of its own.
- minimum: each distinct prompt and each response token once forward, and backward for twice that. The old log-probs
  come from the sampler, and nothing is recomputed.

With --methods it counts a plain step of each method instead, relative to GRPO (a few minutes). With --recipes it prints
the work of an epoch of each recipe, by formula (a few seconds); no time follows from it, because sampling is limited by
memory bandwidth, not by FLOP.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import in_turns, save, trl_trainer, write_model
from torch.utils._python_dispatch import TorchDispatchMode  # where torch's documentation imports it from
from torch.utils.flop_counter import FlopCounterMode, flop_registry

K = 8
MODES = {"plain": "plain", "checkpointing": "gradient checkpointing", "fsdp2": "FSDP2"}
NAMES = {"GRPO": "GRPO, ours", "RLRT": "RLRT, ours", "TRL": "GRPO, TRL"}


# -- the counter ---------------------------------------------------------------------------------------------------


def attention(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    """FLOP of fused attention; queries [B, H, T, D], keys [B, H, K, D]. Two matmuls."""
    batch, heads, queries, width = query
    pairs = queries * key[2] / (2 if causal else 1)
    return round(4 * batch * heads * pairs * width)


def attention_backward(grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *flags: Any, **_: Any) -> int:
    """FLOP of its backward pass: five matmuls, one of which recomputes the weights."""
    return round(2.5 * attention(query, key, value, *flags))


def addmm(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    """FLOP of a matmul that is added in place, [N, K] with [K, M]; TRL's head uses it."""
    return 2 * left[0] * left[1] * right[1]


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    torch.ops.aten.addmm_: addmm,
}
"""Operations that torch's own list lacks."""


class NoneMissed(TorchDispatchMode):
    """Stops at a matmul or attention that the counter would silently count as 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = func._overloadpacket in FORMULAS or func._overloadpacket in flop_registry
        if re.search(r"mm|mv|dot|attention|matmul|linear|conv", func._schema.name) and not known:
            raise SystemExit(f"{func._schema.name} has no formula: add one to FORMULAS")
        return func(*args, **(kwargs or {}))


def flop(run: Callable[[], Any]) -> int:
    """FLOP of a function."""
    with NoneMissed(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted:
        run()
    return counted.get_total_flops()


# -- the rollouts --------------------------------------------------------------------------------------------------


def prompt_text(args: argparse.Namespace, number: int) -> str:
    """A prompt of words, each of which is one token; no two prompts are equal."""
    return " ".join(f"w{10 + number}" for _ in range(args.prompt_tokens))


def response_ids(args: argparse.Namespace, index: int) -> list[int]:
    """The response of the rollout with this index in its group: tokens without an end token."""
    return [2 + index] * args.tokens


def right(text: str) -> bool:
    """Half of a group's responses are correct."""
    return int(text.split()[0][1:]) % 2 == 0


# -- the steps -----------------------------------------------------------------------------------------------------


def listed_data(args: argparse.Namespace) -> Any:
    """A data module whose rollouts come from the list."""
    from rlrt_lightning import Policy, Problem, Rollout, RolloutDataModule, Sampling, Task, Verdict
    from rlrt_lightning.rollouts import RolloutEngine

    class Words(Task):
        isolated = False

        def problems(self, split: str) -> list[Problem]:
            solution = " ".join(["w3"] * args.tokens)
            return [Problem(str(i), prompt_text(args, i), "w3", solution) for i in range(args.prompts)]

        def verify(self, problem: Problem, completion: str) -> Verdict:
            return Verdict(float(right(completion)), right(completion))

    class Listed(RolloutEngine):
        def sync(self, policy: Policy) -> None:
            self.policy = policy

        def generate(self, prompts: Sequence[list[int]], n: int, *_: Any) -> Iterator[Rollout]:
            for group, prompt in enumerate(prompts):
                for index in range(n):
                    ids = response_ids(args, index)
                    text = self.policy.decode(ids)
                    yield Rollout(group, index, prompt, ids, torch.full((len(ids),), -1.0), truncated=True, text=text)

    sampling = Sampling(max_new_tokens=args.tokens)
    return RolloutDataModule(Words(), Listed(), sampling, args.prompts, K, minibatches=1, benchmarks={})


def methods() -> dict[str, Any]:
    """The methods that --methods counts. DIVER is left out, as its rewards take no forward pass."""
    from rlrt_lightning import GRPO, RLCSD, RLRT, RLSD, SDPO, SRPO, AntiSD, EntropyBonus

    return {
        "GRPO": GRPO(),
        "EntropyBonus": EntropyBonus(),
        "RLRT": RLRT(),
        "RLRT-all": RLRT(gated=False),
        "RLRT contrast": RLRT(contrast=True),
        "teacher-predicted": RLSD(gated=True, context="sibling"),
        "RLSD": RLSD(),
        "AntiSD": AntiSD(),
        "RLCSD": RLCSD(),
        "SDPO": SDPO(),
        "SRPO": SRPO(),
    }


def ours(folder: str, method: str, mode: str, args: argparse.Namespace) -> int:
    from lightning import Trainer

    from rlrt_lightning import Policy, RLRTModule, Teacher

    policy = Policy(folder, gradient_checkpointing=mode == "checkpointing")
    policy.load()
    teacher = Teacher("{prompt} {context}")
    module = RLRTModule(policy, teacher, methods()[method], warmup_steps=0)
    data = listed_data(args)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        strategy="fsdp2" if mode == "fsdp2" else "auto",
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=args.micro_batches,
        limit_val_batches=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return flop(lambda: trainer.fit(module, datamodule=data))


def trl(folder: str, mode: str, args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<end>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def listed(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        responses = [response_ids(args, row % K) for row in range(len(input_ids))]
        return torch.cat([input_ids, torch.tensor(responses)], 1)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(right(completion)) for completion in completions]

    model.generate = listed
    trainer = trl_trainer(
        model,
        tokenizer,
        [prompt_text(args, i) for i in range(args.prompts)],
        reward,
        folder,
        K,
        args.tokens,
        max_steps=1,
        use_cpu=True,
        gradient_checkpointing=mode == "checkpointing",
        per_device_train_batch_size=args.prompts * K // args.micro_batches,
        gradient_accumulation_steps=args.micro_batches,
    )
    return flop(trainer.train)


def bounds(folder: str, args: argparse.Namespace) -> dict[str, float]:
    """The minimum; what `rlrt_lightning.policy.work` and the head predict for our plain GRPO; and the work of a head,
    recomputed in the backward pass, on the prompts."""
    from rlrt_lightning import Policy

    policy = Policy(folder)
    policy.load()
    rows, read, responses = args.prompts * K, args.tokens - 1, args.prompts * K * args.tokens
    head = 2 * policy.model.get_output_embeddings().weight.numel() * responses
    per_token, per_pair = policy.work
    tokens = args.prompts * args.prompt_tokens + rows * read  # the last token of a response is not an input
    pairs = args.prompts * args.prompt_tokens**2 / 2 + rows * read * (args.prompt_tokens + read / 2)
    sequences = [([i] * args.prompt_tokens, [0] * read) for i in range(args.prompts) for _ in range(K)]
    shares = policy.work.worth_sharing([(prompt, [0] * args.tokens) for prompt, _ in sequences])
    decoder = policy.work.sharing(sequences) if shares else policy.work.separately(sequences)
    # The head's logits are computed again in the backward pass.
    return {
        "minimum": 3 * (per_token * tokens + per_pair * pairs + head),
        "predicted": 3 * decoder + 4 * head,
        "prompts_in_head": 4 * head / args.tokens * (args.prompt_tokens - 1),
    }


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Counts one case in this process."""
    shape = {
        "hidden_size": args.hidden,
        "intermediate_size": 2 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": args.hidden // 4,
        "vocab_size": args.vocabulary,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        if args.case == "bounds":
            return bounds(folder, args)
        who, mode = args.case.split("/")
        return {"flop": trl(folder, mode, args) if who == "TRL" else ours(folder, who, mode, args)}


def print_table(found: dict[str, float], limits: dict[str, float], args: argparse.Namespace) -> None:
    rollouts = f"{args.prompts} prompts of {args.prompt_tokens} tokens x {K} rollouts of {args.tokens}"
    print(f"{rollouts}, {args.layers} layers of {args.hidden}, V = {args.vocabulary:,}\n")
    print(f"| GFLOP (relative to the minimum) | {' | '.join(MODES.values())} |\n| --- |{' --- |' * len(MODES)}")
    minimum = limits["minimum"]

    def row(name: str, counts: Sequence[float | None]) -> None:
        cells = ["" if count is None else f"{count / 1e9:.0f} ({count / minimum:.2f})" for count in counts]
        print(f"| {name} | {' | '.join(cells)} |")

    for who, name in NAMES.items():
        row(name, [found.get(f"{who}/{mode}") for mode in MODES])
    if "TRL/plain" in found:  # on a CPU its head computes the logits of the prompts too
        excess = limits["prompts_in_head"]
        row(
            "GRPO, TRL on a GPU (calculated)", [found[f"TRL/{m}"] - excess for m in ("plain", "checkpointing")] + [None]
        )
    relative = [f"{found[f'RLRT/{mode}'] / found[f'GRPO/{mode}']:.2f}" for mode in MODES]
    print(f"| RLRT relative to GRPO | {' | '.join(relative)} |")
    print(f"| minimum for GRPO | {minimum / 1e9:.0f} (1.00) |{' |' * (len(MODES) - 1)}")
    predicted, counted = limits["predicted"], found["GRPO/plain"]
    print(f"\nours, plain: {counted / 1e9:.1f} GFLOP counted, {predicted / 1e9:.1f} predicted by policy/work.py")


def count_methods(args: argparse.Namespace) -> None:
    """Counts a plain step of each method and prints a table."""
    cases = [f"{name}/plain" for name in methods()]
    counts = {case: turns[0]["flop"] for case, turns in in_turns(cases, 1, "case").items()}
    save(args.out, {"counts": counts, "settings": vars(args)})
    print("| method | GFLOP | relative to GRPO |\n| --- | --- | --- |")
    for case, count in counts.items():
        print(f"| {case.split('/')[0]} | {count / 1e9:.0f} | {count / counts['GRPO/plain']:.2f} |")


# -- the recipes ---------------------------------------------------------------------------------------------------

PROMPT = 200
"""Assumed length of a recipe's prompt, in tokens."""


def epoch_work(recipe: Path, length: int) -> dict[str, float]:
    """FLOP of an epoch of a recipe whose model is a Qwen3, by part: matmuls with the weights and the head, and causal
    attention. Each distinct prompt, and each of the teacher's contexts, is read once for all its rollouts; training
    reads each sequence whole, and its backward pass is twice the forward pass.

    Args:
        recipe: The config.
        length: Length of every response, in tokens.
    """
    from memory import qwen3, section
    from transformers import AutoModelForCausalLM

    from rlrt_lightning.policy.work import Work

    policy, data = section(recipe, "model")["policy"], section(recipe, "data")
    config = qwen3(re.findall(r"[\d.]+B", policy["path"])[0])
    with torch.device("meta"):
        work = Work.of(AutoModelForCausalLM.from_config(config).model, config)
    prompts, rollouts = data["prompts_per_epoch"], data["prompts_per_epoch"] * data["rollouts_per_prompt"]

    def forward(prefixes: int, prefix: int) -> float:
        """Prefixes that are read once, and the rollouts after them."""
        tokens = prefixes * prefix + rollouts * length
        pairs = prefixes * prefix**2 / 2 + rollouts * length * (prefix + length / 2)
        head = 2.0 * config.hidden_size * config.vocab_size * rollouts * length
        return work.per_token * tokens + work.per_pair * pairs + head

    # The context is another correct rollout of the group: the first one for all but itself, which gets the second.
    teacher = forward(2 * prompts, PROMPT + length)
    policy_scores = forward(prompts, PROMPT) if data["rescore"] else 0.0
    passes = 4 if policy.get("gradient_checkpointing", False) else 3
    return {
        "rollouts": forward(prompts, PROMPT),
        "scoring": policy_scores + teacher,
        "training": passes * forward(rollouts, PROMPT),
    }


def recipes_table() -> str:
    """The table of the recipes."""
    from memory import section

    lines = [
        "| recipe | rollouts of an epoch | tokens of a response | rollouts, PFLOP | scoring | training | in all |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for path in sorted((Path(__file__).parents[1] / "configs/recipes").glob("*.yaml")):
        data = section(path, "data")
        longest = data["sampling"]["max_new_tokens"]
        for length in (longest // 4, longest):
            parts = epoch_work(path, length)
            petaflop = [flop / 1e15 for flop in (*parts.values(), sum(parts.values()))]
            cells = " | ".join(f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in petaflop)
            rollouts = data["prompts_per_epoch"] * data["rollouts_per_prompt"]
            lines.append(f"| `{path.stem}` | {rollouts:,} | {length:,} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help=f"prompts per step, with {K} rollouts each")
    parser.add_argument("--prompt-tokens", type=int, default=96, help="prompt length")
    parser.add_argument("--tokens", type=int, default=128, help="response length")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--layers", type=int, default=6, help="number of layers")
    parser.add_argument("--vocabulary", type=int, default=16384, help="vocabulary size")
    parser.add_argument("--methods", action="store_true", help="count each method")
    parser.add_argument("--recipes", action="store_true", help="the work of an epoch of each recipe, by formula")
    parser.add_argument("--out", help="JSON file for all counts")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args)), flush=True)
        return
    if args.recipes:
        print(recipes_table())
        return
    if args.methods:
        count_methods(args)
        return
    cases = ["bounds", *(f"{who}/{mode}" for who in ("GRPO", "RLRT") for mode in MODES)]
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed and is left out: pip install -e '.[bench]'")
    else:
        cases += ["TRL/plain", "TRL/checkpointing"]
    found = {case: turns[0] for case, turns in in_turns(cases, 1, "case").items()}
    limits = found.pop("bounds")
    counts = {case: values["flop"] for case, values in found.items()}
    save(args.out, {"counts": counts, "limits": limits, "settings": vars(args)})
    print_table(counts, limits, args)


if __name__ == "__main__":
    main()

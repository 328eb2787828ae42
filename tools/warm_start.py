"""Makes the small model that comes with the task: `python tools/warm_start.py --out DIR`.

It writes a tokenizer and a tiny Qwen3 model, trained from nothing to take the three ways in given shares and to follow
a solution that it is shown, and prints what the model can do. The number of steps and the seed decide everything but
the last bits of the arithmetic, which depend on the machine. It takes about 4 minutes on one core.

A question is the user's message: `tea 4 milk 5 eggs 7 rice 0, last digit of the total?`. The teacher's message shows a
solution after it: `... a correct solution: guess 6. now answer:`.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlrt_lightning.tasks.base import Problem
from rlrt_lightning.tasks.last_digit.task import (
    CONTROL_SHARES,
    FEWEST,
    ITEMS,
    MOST,
    TEACHER_TEMPLATE,
    TRAP_SHARES,
    LastDigit,
    draw_digits,
    question,
    solution,
)

PAD, EOS, UNKNOWN, USER, ASSISTANT = SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")

WORDS = (
    *(" last", " digit", " of", " total", "?"),
    *("guess", " guess", "skip", " skip", " the", "quickly", " quickly", "carefully", " carefully", ":", ",", " so"),
    *(" a", " correct", " solution", ".", " now", " answer"),
    *(f" {digit}" for digit in range(10)),
    *(f" ({digit})" for digit in range(10)),
    *(f" {item}" for item in ITEMS),
    ITEMS[0],
)
"""Tokens hold the space before them, so that texts are tokens joined. Words that begin a text also exist without it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<user>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<assistant>' + message.content + '<eos>' }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

ROWS = 64  # of a batch
PHASES = (  # (steps, peak learning rate, whether the ways are balanced)
    (800, 2e-3, True),  # learn to work out the sums
    (450, 2e-3, False),  # forget to want to: each way falls to its share
)
TEACHER_ROWS = 0.4  # share of the rows that show a solution
FOLLOWING = 0.8  # share of those rows whose response takes the way of the solution
REPORT_PROBLEMS = 320
RESPONSE_LENGTH = 32  # tokens; the longest response has 15


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the tokenizer: one token for each word, digit and punctuation mark, and the special tokens."""
    vocabulary = [*SPECIAL, *WORDS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" \([0-9]\)| ?(?:[a-z]+|.|\n)"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Makes the model, its weights drawn from torch's global random stream."""
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.04,
            **tokens,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, **tokens)
    return model


def conversations(rng: random.Random, shares: dict[str, float], trap: bool) -> Iterator[list[dict[str, str]]]:
    """Yields conversations to learn from, for ever: the student's question or the teacher's, and a response."""

    def choose() -> str:
        return rng.choices(list(shares), list(shares.values()))[0]

    while True:
        digits = draw_digits(rng, FEWEST, MOST, trap=trap)
        prompt = question(digits)
        if rng.random() < TEACHER_ROWS:
            shown = rng.choice(list(shares))
            way = shown if rng.random() < FOLLOWING else choose()
            prompt = TEACHER_TEMPLATE.format(prompt=prompt, context=solution(digits, shown))
            response = solution(digits, way)  # who sees the answer makes no slips
        else:
            response = solution(digits, choose(), rng)
        yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def batches(source: Iterator[list[dict[str, str]]], rng: random.Random) -> Iterator[list[list[dict[str, str]]]]:
    """Yields batches of conversations of similar length, in random order, for ever."""
    while True:
        rows = sorted((next(source) for _ in range(8 * ROWS)), key=lambda row: sum(len(m["content"]) for m in row))
        chunks = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
        rng.shuffle(chunks)
        yield from chunks


def loss_of(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the response tokens of right-padded rows."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:]
    responding = (ids[:, :-1] == tokenizer.get_vocab()[ASSISTANT]).cumsum(1) > 0
    targets = targets.masked_fill(~responding | (targets == tokenizer.pad_token_id), -100)
    # A constant divisor: a mean over the tokens of batches of similar length would count short answers for more, and
    # so would give the direct way more than its share.
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / (12 * len(ids))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, trap: bool) -> None:
    """Trains the model through the phases."""
    rng = random.Random(seed)
    model.train()
    for number, (steps, peak, balanced) in enumerate(PHASES, 1):
        shares = TRAP_SHARES if trap else CONTROL_SHARES
        if balanced:
            shares = dict(zip(shares, (0.2, 0.4, 0.4), strict=True))
        source = batches(conversations(rng, shares, trap), rng)
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
        recent: list[float] = []
        for step in range(steps):
            texts = tokenizer.apply_chat_template(next(source), tokenize=False)
            ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
            cosine = 1 + math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 30) * (0.03 + 0.97 * cosine / 2)
            loss = loss_of(model, tokenizer, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            if (step + 1) % 100 == 0:
                print(f"phase {number}  step {step + 1:5d}  loss {sum(recent) / len(recent):.4f}", flush=True)
                recent.clear()
    model.eval()


@torch.inference_mode()
def respond(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: list[str], k: int = 8
) -> list[list[str]]:
    """Samples k responses to each user's message."""
    texts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": message}] for message in messages], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    # Any: `generate` is annotated differently from release to release.
    ids: torch.Tensor = cast(Any, model).generate(
        **inputs, do_sample=True, top_k=0, num_return_sequences=k, max_new_tokens=RESPONSE_LENGTH, use_cache=True
    )
    responses = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [responses[i : i + k] for i in range(0, len(responses), k)]


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, trap: bool) -> None:
    """Prints how often student and teacher are right, and which ways they take, on held-out problems."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for digits in ((4, 6), (7, 8)):
        task = LastDigit(digits=digits, trap=trap, heldout=REPORT_PROBLEMS)
        problems = list(task.problems("heldout"))
        groups = respond(model, tokenizer, [str(problem.prompt) for problem in problems])
        print(f"{digits[0]} to {digits[1]} digits, {len(problems)} held-out problems")
        print(describe("student", task, problems, groups))
        shown = [
            (problem, rng.choice(right))
            for problem, group in zip(problems, groups, strict=True)
            if (right := [text for text in group if task.verify(problem, text).correct])
        ]
        messages = [TEACHER_TEMPLATE.format(prompt=problem.prompt, context=text) for problem, text in shown]
        groups = respond(model, tokenizer, messages)
        print(describe("teacher, shown a correct sibling", task, [problem for problem, _ in shown], groups))


def describe(name: str, task: LastDigit, problems: list[Problem], groups: list[list[str]]) -> str:
    """Puts the scores of a set of responses into words."""
    verdicts = [[task.verify(problem, text) for text in group] for problem, group in zip(problems, groups, strict=True)]
    count: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for verdict in (verdict for group in verdicts for verdict in group):
        count[str(verdict.label)] += 1
        right[str(verdict.label)] += verdict.correct
    total, k = sum(count.values()), len(groups[0])
    lines = [
        f"  {name}: avg@{k} {sum(right.values()) / total:.3f}, "
        f"pass@{k} {sum(any(v.correct for v in group) for group in verdicts) / len(verdicts):.3f}"
    ]
    for label, n in count.most_common():
        lines.append(f"    {label:9s} share {n / total:6.1%}  right {right[label] / n:.3f}  ({n} responses)")
    return "\n".join(lines)


def main() -> None:
    """Makes, trains, measures and saves the model."""
    parser = argparse.ArgumentParser(prog="python tools/warm_start.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the examples (default: 0)")
    parser.add_argument("--no-trap", action="store_true", help="make the control, whose ways skip no place")
    parser.add_argument("--report-only", action="store_true", help="measure the model that is already in the folder")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the model is too small for a second one to help
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    if args.report_only:
        model = Qwen3ForCausalLM.from_pretrained(args.out)
    else:
        model = make_model(tokenizer)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        start = time.perf_counter()
        train(model, tokenizer, args.seed, trap=not args.no_trap)
        print(f"trained in {time.perf_counter() - start:.0f} s")
        tokenizer.save_pretrained(args.out)
        model.save_pretrained(args.out)
    report(model, tokenizer, args.seed, trap=not args.no_trap)


if __name__ == "__main__":
    main()

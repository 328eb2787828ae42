"""Trains on a data file with a reward of your own.

python examples/custom_reward.py

The same from the command line, with files of your own such as `write_totals` writes:

python -m rlrt_lightning fit --config configs/rlrt.yaml --data.task=DatasetTask --data.task.train=totals.jsonl \
  --data.task.heldout=heldout.jsonl --data.task.prompt=question --data.task.answer=answer \
  --data.task.reward=examples.custom_reward.short_and_right
"""

import json
import random
import tempfile
from pathlib import Path

import torch
from lightning import Trainer

from rlrt_lightning import DatasetTask, Policy, Problem, RLRTModule, RolloutDataModule, Sampling, Teacher, Verdict


def short_and_right(problem: Problem, completion: str) -> Verdict:
    """1 for the right last digit, and half of it for an answer that is longer than necessary.

    Args:
        problem: `answer` is the ground truth; the row's other columns are in `info`.
        completion: The text to judge.
    """
    correct = completion.strip().endswith(f" {problem.answer}")
    short = len(completion) < 80
    # The label is plotted as labels/short and labels/long: which share of the rollouts took which way.
    return Verdict(reward=float(correct) * (1.0 if short else 0.5), correct=correct, label="short" if short else "long")


def write_totals(path: Path, rows: int, seed: int) -> None:
    """Writes questions about totals with their answers."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            numbers = [rng.randint(1, 9) for _ in range(4)]
            items = " ".join(f"{item} {n}" for item, n in zip(("tea", "milk", "eggs", "rice"), numbers, strict=True))
            row = {"question": f"{items}, last digit of the total?", "answer": str(sum(numbers) % 10)}
            file.write(json.dumps(row) + "\n")


def main(max_epochs: int = 10) -> None:
    """Trains on a file that is written first, and evaluates on another one."""
    with tempfile.TemporaryDirectory() as folder:
        train, heldout = Path(folder) / "train.jsonl", Path(folder) / "heldout.jsonl"
        write_totals(train, rows=400, seed=0)
        write_totals(heldout, rows=40, seed=1)
        task = DatasetTask(str(train), str(heldout), prompt="question", answer="answer", reward=short_and_right)
        module = RLRTModule(
            Policy("embedded"),
            Teacher("{prompt} a correct solution: {context}. now answer:"),
            optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
            warmup_steps=0,
        )
        data = RolloutDataModule(task, sampling=Sampling(max_new_tokens=32), prompts_per_epoch=16)
        Trainer(max_epochs=max_epochs, check_val_every_n_epoch=max_epochs).fit(module, data)


if __name__ == "__main__":  # the processes that verify completions import this file
    main()

"""Trains the small model that ships with the package, evaluates it and samples from it.

python examples/train.py
"""

import torch
from lightning import Trainer

from rlrt_lightning import RLRT, Policy, RLRTModule, RolloutDataModule, Sampling, Teacher


def main(max_epochs: int = 20) -> None:
    """Trains, then answers one question."""
    module = RLRTModule(
        Policy("embedded"),  # a Hugging Face id or a folder for any other model
        Teacher("{prompt} a correct solution: {context}. now answer:"),  # Teacher() for models with a chat template
        RLRT(lam=0.5, eps_w=1.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
        warmup_steps=0,
    )
    data = RolloutDataModule(prompts_per_epoch=16, rollouts_per_prompt=8, sampling=Sampling(max_new_tokens=32))
    trainer = Trainer(max_epochs=max_epochs, check_val_every_n_epoch=max_epochs, gradient_clip_val=1.0)
    trainer.fit(module, data)

    policy = module.policy
    prompt = torch.tensor([policy.encode_prompt("tea 4 milk 5 eggs 7 rice 0, last digit of the total?")])
    print(policy.tokenizer.decode(policy.model.generate(prompt, max_new_tokens=32)[0]))


if __name__ == "__main__":  # the processes that verify completions import this file
    main()

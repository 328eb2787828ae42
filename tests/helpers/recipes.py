"""What the recipes should resolve to, and the wording of their data."""

from __future__ import annotations

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What a recipe should resolve to.

    Args:
        path: The model.
        eps_w: The paper's clip range for this kind of model.
        positions: Positions of the model, from its config.json.
        chat_kwargs: Variables of the chat template.
    """

    path: str
    eps_w: float
    positions: int
    chat_kwargs: dict[str, Any] | None


RECIPES = {
    "gsm8k-qwen3-0.6b": Recipe("Qwen/Qwen3-0.6B", 0.2, 40960, {"enable_thinking": False}),
    "gsm8k-qwen3-1.7b": Recipe("Qwen/Qwen3-1.7B", 0.2, 40960, {"enable_thinking": False}),
    "paper-qwen3-4b-base": Recipe("Qwen/Qwen3-4B-Base", 1.0, 32768, None),
    "paper-qwen3-8b-base": Recipe("Qwen/Qwen3-8B-Base", 1.0, 32768, None),
    "paper-qwen3-4b-instruct": Recipe("Qwen/Qwen3-4B-Instruct-2507", 0.5, 262144, None),
    "paper-qwen3-8b": Recipe("Qwen/Qwen3-8B", 0.2, 40960, {"enable_thinking": True}),
}

BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def published(question: str) -> str:
    """A prompt of DAPO-Math-17k as published."""
    return (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        f"$Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )

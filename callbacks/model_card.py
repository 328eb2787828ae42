"""The model card of an exported policy: what it was trained from, on which data, how, and its scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from lightning import Trainer

from rlrt_lightning import __version__, resume

from .parts import data_of, without_folders

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule

PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")
SETTINGS = re.compile(
    r"model\.(method|teacher|optimizer(?!\.state)|clip|dual_clip|aggregation|importance|warmup_steps)|teacher_refresh|"
    r"data\.(task|sampling|prompts_per_epoch|rollouts_per_prompt|minibatches|rescore|seed)|"
    r"trainer\.(max_epochs|precision|gradient_clip_val)"
)
"""The settings that a card shows: those that determine what is learned."""


def model_card(trainer: Trainer, module: RLRTModule, adapter: bool = False) -> ModelCard:
    """Describes a trained policy in the format of the Hugging Face Hub.

    Of a local path only the last part is shown, because a card is made to be published.

    Args:
        trainer: The trainer, after training.
        module: The module.
        adapter: Whether only the adapters are exported.
    """
    found = resume.settings(trainer, module, data_of(trainer))
    settings = {name: without_folders(value) for name, value in found.items() if value is not None}
    base, method = settings["model.policy.path"], type(module.method).__name__
    sources = [found.get(f"data.task.{split}") for split in ("train", "heldout")]
    header = ModelCardData(
        base_model=base if _on_hub(found["model.policy.path"]) else None,
        datasets=sorted({str(source).split(":")[0] for source in sources if _on_hub(source)}) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "rlvr", "rlrt_lightning", method.lower()],
    )
    data = (
        settings["data.task"] if sources[0] is None or not isinstance(sources[0], str) else without_folders(sources[0])
    )
    shown = {name: value for name, value in settings.items() if SETTINGS.match(name)}
    parts = [
        f"# {Path(base).name}, trained with {method}",
        f"The {'adapters' if adapter else 'weights'} of {base} after {trainer.current_epoch} epochs "
        f"({trainer.global_step} optimizer steps) of {_method(module)} on {data}, made with rlrt_lightning "
        f"{__version__}.",
        "## Scores",
        _scores(trainer),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(shown, sort_keys=True, allow_unicode=True)}```",
    ]
    if papers := _papers(module):
        cited = "\n".join(f"- <https://arxiv.org/abs/{paper}>" for paper in papers)
        parts += ["## Citation", f"Please cite the paper of the method:\n\n{cited}"]
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _scores(trainer: Trainer) -> str:
    """A table of avg@n and pass@k of the last evaluation."""
    rows = ["| evaluation set | metric | value | 95 % interval over problems |", "| --- | --- | ---: | --- |"]
    metrics = trainer.callback_metrics
    for tag in sorted(metrics):
        if match := re.fullmatch(r"eval/(.+)/((?:avg|pass)@\d+)", tag):
            low, high = (float(metrics[f"{tag}_{bound}"]) for bound in ("low", "high"))
            rows.append(f"| {match[1]} | {match[2]} | {float(metrics[tag]):.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(rows) if len(rows) > 2 else "The policy was not evaluated during training."


def _method(module: RLRTModule) -> str:
    name, papers = type(module.method).__name__, _papers(module)
    return f"[{name}](https://arxiv.org/abs/{papers[0]})" if papers else name


def _papers(module: RLRTModule) -> list[str]:
    """arXiv ids in the docstring of the method's class, or of the next base class that names one."""
    docs = (vars(cls).get("__doc__") or "" for cls in type(module.method).__mro__)
    return next((sorted(set(ids)) for ids in map(PAPER.findall, docs) if ids), [])


def _on_hub(source: Any) -> bool:
    return (
        isinstance(source, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:.*)?", source)) and not Path(source).exists()
    )

"""The commands in README.md and docs/: they parse, the files that they read exist, and they run as printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from lightning import Trainer

from rlrt_lightning.__main__ import main
from rlrt_lightning.tasks import DatasetTask
from rlrt_lightning.tasks.base import Split
from tests.helpers.command_line import ParsingCli
from tests.helpers.processes import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "CONTRIBUTING.md"]
PROGRAMS = "python pip tensorboard torchrun srun bash ruff mypy sphinx-build docker".split()


class Block(NamedTuple):
    """A block of commands.

    Args:
        page: Its page.
        line: Its first line.
        text: The commands.
        needs: What it needs besides a CPU and a minute, from the comment before it, such as `<!-- needs: GPU -->`.
    """

    page: str
    line: int
    text: str
    needs: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"(?:<!-- needs: (.+) -->\n+)?^```bash\n(.*?)^```$", text, flags=re.M | re.S)
    return [Block(page, text[: m.start(2)].count("\n") + 1, m[2], m[1] or "") for m in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def ids(block: Block) -> str:
    return f"{block.page}:{block.line}"


def write_modules(page: str, folder: Path) -> None:
    """Writes the Python files that a page shows: blocks that begin with their name, as in `# my_rewards.py`."""
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S):
        (folder / name).write_text(code)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs that write their arguments to the file `$CALLS` and do nothing else."""
    folder = tmp_path_factory.mktemp("programs")
    for name in PROGRAMS:
        path = folder / name
        path.write_text(
            f"#!{sys.executable} -S\nimport json, os, sys\n"
            f"open(os.environ['CALLS'], 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return folder


def calls(block: Block, programs: Path, folder: Path) -> list[list[str]]:
    """The programs that a block calls, with their arguments as bash expands them."""
    env = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "SLURM_JOB_ID": "1"}
    text = re.sub(r"^\. \S+activate( && )?", "", block.text, flags=re.M).replace(". .venv/bin/activate && ", "")
    subprocess.run(["/bin/bash", "-euc", text], cwd=folder, env=env, check=True)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def ours(call: list[str]) -> list[str] | None:
    """The arguments of our command line in a call; None if it calls another program."""
    for i in range(len(call) - 1):
        if call[i : i + 2] == ["-m", "rlrt_lightning"]:
            return call[i + 2 :]
    return None


def exit_code(words: list[str]) -> int:
    """Runs the command line, which exits itself after printing a help text."""
    try:
        return main(words)
    except SystemExit as exited:
        return int(exited.code or 0)


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_commands_in_the_docs_parse_and_their_files_exist(
    block: Block, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    write_modules(block.page, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for call in calls(block, programs, tmp_path):
        words = ours(call)
        if words is None:
            scripts = [word for word in call[1:] if re.match(r"(benchmarks|tools|examples|tests|\.ci)/", word)]
            assert all((ROOT / script).exists() for script in scripts), call
        elif any(word in ("--help", "--print_config", "--version") or word.endswith(".help") for word in words):
            assert exit_code(words) == 0
        elif words[0] in ("fit", "validate", "test", "predict", "reflection", "shift"):
            ParsingCli(words)
        else:
            assert words[0] in ("serve", "curves", "pass_at_k"), call


PYTHON = [
    pytest.param(code, id=f"{page}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S))
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_in_the_docs_compiles_and_imports_what_exists(code: str) -> None:
    compile(code, "docs", "exec")
    for line in re.findall(r"^(?:from|import) (?:rlrt_lightning|lightning|torch|transformers)\b.*$", code, flags=re.M):
        exec(line, {})


def test_the_python_of_the_readme_has_the_settings_of_the_recipe_for_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It builds its objects as printed; only the run itself is left out."""
    (code,) = re.findall(r"^```python\n(from lightning.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    write_modules("README.md", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        Path(name).write_text('{"question": "2 + 2?", "answer": "4"}\n')
    fitted: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda *parts: fitted.extend(parts))
    exec(code, {"__name__": "__main__"})
    trainer, module, data = fitted
    recipe = ParsingCli(["fit", "--config=recipes/gsm8k-qwen3-0.6b"]).config.fit
    for name in ("precision", "gradient_clip_val", "max_epochs", "check_val_every_n_epoch"):
        assert getattr(trainer, name) == recipe.trainer[name], name
    for name in "prompts_per_epoch rollouts_per_prompt minibatches tokens_per_pass max_prompt_tokens rescore".split():
        assert getattr(data, name) == recipe.data[name], name
    assert vars(data.sampling) == vars(recipe.data.sampling)
    assert (module.policy.path, module.policy.chat_kwargs) == (
        recipe.model.policy.path,
        recipe.model.policy.chat_kwargs,
    )
    assert vars(module.method) == vars(recipe.model.method.init_args)
    (own,), (theirs,) = data.benchmarks.values(), recipe.data.benchmarks.values()
    assert (own.samples, own.limit) == (theirs.samples, theirs.limit)
    assert data.engine.dtype == "bfloat16"
    assert [problem.answer for problem in data.task.problems("train")] == ["4"]


@pytest.mark.parametrize("answer", [4, "4"])
def test_readmes_command_for_own_data_reads_its_rows_and_its_reward_judges_them(
    answer: int | str, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_modules("README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (block,) = [block for block in BLOCKS if block.page == "README.md" and "own_data" in block.text]
    words = next(filter(None, map(ours, calls(block, programs, tmp_path))))
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "1+3?", "answer": answer}))
    settings = ParsingCli(words).config.fit.data.task.init_args
    task = DatasetTask(**vars(settings))
    for split in get_args(Split):
        (problem,) = task.problems(split)
        for completion, reward in ((r"1+3=\boxed{4}.", 1.0), ("4 + 1 = 14", 0.0), ("It is 4. " * 100, 0.0), ("", 0.0)):
            assert task.verify(problem, completion).reward == reward


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, in which commands may write."""
    folder = tmp_path_factory.mktemp("repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_commands_of_a_page_run_as_printed_and_in_their_order(page: str, copy: Path, tmp_path: Path) -> None:
    """After those of README.md. `pip` does nothing: the packages are installed."""
    write_modules(page, copy)
    (tmp_path / "pip").write_text("#!/bin/sh\n")
    (tmp_path / "pip").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(copy), "CUDA_VISIBLE_DEVICES": ""}
    for block in blocks(page):
        if block.needs or "python -m pytest" in block.text:
            continue
        text = block.text.replace("python -m venv .venv && . .venv/bin/activate && ", "")
        text = text.replace("tensorboard --logdir runs\n", "")
        ran = subprocess.run(["/bin/bash", "-euc", text], cwd=copy, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, f"{block.page}:{block.line}\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}"

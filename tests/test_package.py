"""The package as users get it: from a clone, as an editable install, and as a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import rlrt_lightning
from rlrt_lightning.callbacks import TeacherRefresh
from tests.helpers.processes import ROOT

PRINT_CALLBACKS_PATH = """
import rlrt_lightning, rlrt_lightning.callbacks as c
from rlrt_lightning import Policy, LastDigit
Policy().tokenizer
assert c.TeacherRefresh.__module__ == "rlrt_lightning.callbacks.teacher_refresh", c.TeacherRefresh.__module__
print(c.__file__)
"""
PRINT_RECIPE = """
from rlrt_lightning.__main__ import main
main(["fit", "--config", "recipes/gsm8k-qwen3-0.6b", "--print_config"])
"""


def run_python(code: str, *paths: Path, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    out = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_a_clone_finds_its_callbacks() -> None:
    """Without importing them, which takes longer; that is tested for the wheel."""
    code = "from importlib.util import find_spec; print(find_spec('rlrt_lightning.callbacks').origin)"
    assert run_python(code, cwd=ROOT) == str(ROOT / "callbacks" / "__init__.py")
    assert TeacherRefresh.__module__ == "rlrt_lightning.callbacks.teacher_refresh"
    with pytest.raises(ModuleNotFoundError):
        import_module("rlrt_lightning.callbacks.nonsense")


def test_other_folders_of_a_clone_are_not_importable_from_the_package() -> None:
    """A second class `ConfigError` would slip past every `except` of the first."""
    code = """
import importlib, pkgutil, rlrt_lightning
for name in ("tests", "benchmarks", "rlrt_lightning.runtime.errors"):
    try:
        importlib.import_module(f"rlrt_lightning.{name}")
    except ModuleNotFoundError:
        print(name)
print(sorted(m.name for m in pkgutil.iter_modules(rlrt_lightning.__path__) if m.name in ("tests", "benchmarks")))
"""
    assert run_python(code, cwd=ROOT).splitlines() == ["tests", "benchmarks", "rlrt_lightning.runtime.errors", "[]"]


def test_a_type_checker_sees_the_callbacks(tmp_path: Path) -> None:
    """Checks only the callbacks and a wrong use of them, which is fast; CI runs mypy on the whole package."""
    mypy = pytest.importorskip("mypy.api")
    for part in ("callbacks", "typings"):
        shutil.copytree(ROOT / part, tmp_path / part)
    package = tmp_path / "rlrt_lightning"
    package.mkdir()
    for file in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "rlrt_lightning" / file, package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (package / "user.py").write_text(
        "from rlrt_lightning.callbacks import TeacherRefresh\nTeacherRefresh(1)\nTeacherRefresh('daily')\n"
        "from rlrt_lightning import Nonsense, Policy\n"
    )
    with (tmp_path / "callbacks" / "teacher_refresh.py").open("a") as file:
        file.write('\ndef broken() -> int:\n    return ""\n')
    places = [str(tmp_path / part) for part in ("rlrt_lightning", "callbacks")]
    flags = ["--config-file", str(tmp_path / "pyproject.toml"), "--follow-imports=skip", "--cache-dir", os.devnull]
    lines = mypy.run([*flags, *places])[0].splitlines()
    assert [line for line in lines if "user.py:3:" in line and "[arg-type]" in line], lines
    (line,) = [line for line in lines if "user.py:4:" in line]
    assert line.endswith('error: Module "rlrt_lightning" has no attribute "Nonsense"  [attr-defined]')
    assert [line for line in lines if "teacher_refresh.py" in line and "[return-value]" in line], lines
    assert not [line for line in lines if "user.py:2" in line or 'rlrt_lightning.callbacks"' in line], lines


@pytest.mark.slow  # .ci/run runs it for the wheel
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_an_installed_package_has_the_callbacks_the_model_and_the_configs(how: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a copy, since a build writes into its source folder
    for part in ("rlrt_lightning", "callbacks", "configs"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    if how == "wheel":
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
        (wheel,) = tmp_path.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert not any(name.startswith(("callbacks/", "tests/", "configs/")) for name in names)
        assert "rlrt_lightning/tasks/last_digit/model/model.safetensors" in names
        own = {f"rlrt_lightning/callbacks/{file.name}" for file in (ROOT / "callbacks").glob("*.py")}
        assert own == {name for name in names if name.startswith("rlrt_lightning/callbacks/")}
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
        where = run_python(PRINT_CALLBACKS_PATH, tmp_path / "site", cwd=tmp_path)
        assert where == str(tmp_path / "site" / "rlrt_lightning" / "callbacks" / "__init__.py")
        printed = run_python(PRINT_RECIPE, tmp_path / "site", cwd=tmp_path)
        assert "path: Qwen/Qwen3-0.6B" in printed
        assert "train: openai/gsm8k:main:train" in printed, "a section in a file of its own"
    else:
        target = ["--no-deps", "--target", str(tmp_path / "site")]
        subprocess.run([*pip, "install", *target, "--editable", str(source)], check=True)
        # An editable install that the tests themselves run from would be found first.
        code = f"""
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
for name in [n for n in sys.modules if n.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path / "site")!r})
site.addsitedir({str(tmp_path / "site")!r})  # reads the .pth file, as Python does at startup
{PRINT_CALLBACKS_PATH}"""
        assert run_python(code, cwd=tmp_path) == str(source / "callbacks" / "__init__.py")


def test_all_public_names_exist_and_are_documented() -> None:
    some = {"RLRTModule", "RolloutDataModule", "Policy", "RLRT", "Signals", "Task", "clipped_surrogate", "ConfigError"}
    assert some <= set(rlrt_lightning.__all__)
    assert set(dir(rlrt_lightning)) >= set(rlrt_lightning.__all__)
    for name in rlrt_lightning.__all__:
        assert getattr(rlrt_lightning, name).__doc__, name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rlrt_lightning.nonsense


def test_verifier_processes_do_not_import_torch(tmp_path: Path) -> None:
    code = "import sys, rlrt_lightning.tasks, rlrt_lightning.tasks.verifier; print('torch' in sys.modules)"
    assert run_python(code, ROOT, cwd=tmp_path) == "False"


def test_the_installed_command_imports_rewards_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m` does; a script's own import path starts with the folder of the script."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((module, function),) = re.findall(r'^rlrt_lightning = "([\w.]+):(\w+)"$', text, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", ["rlrt_lightning", "--version"])
    assert getattr(import_module(module), function)() == 0
    assert sys.path[0] == str(tmp_path)

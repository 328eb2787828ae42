"""No code in a model, a checkpoint or a data set is executed, and no credential is saved or printed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlrt_lightning import ConfigError, Policy
from rlrt_lightning.__main__ import main
from rlrt_lightning.callbacks.boards import markdown
from rlrt_lightning.callbacks.signal_picture import Picture, Scored, Token, html_page
from rlrt_lightning.policy.model import EMBEDDED
from rlrt_lightning.rollouts.vllm_client import Server
from rlrt_lightning.rollouts.vllm_serve import server_command
from rlrt_lightning.rollouts.vllm_server import VllmServerEngine
from rlrt_lightning.runtime.credentials import masked, refuse_credentials
from rlrt_lightning.tasks import DatasetTask
from tests.helpers.command_line import cli_exit_code
from tests.helpers.marks import slow_except

TOKENS = {"HF_TOKEN": "hf_canary1", "VLLM_API_KEY": "canary2", "WANDB_API_KEY": "canary3"}


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that executed code would create; a question on the terminal fails the test."""

    def asked(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    return tmp_path / "canary"


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    return line


# -- models --------------------------------------------------------------------------------------------------------


def model_folder(folder: Path, *left_out: str, **config: Any) -> Path:
    """A folder with the embedded model and further settings in its config."""
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        if file.name not in left_out:
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def with_code(folder: Path, canary: Path) -> None:
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass C: ...\n")


AUTO_MAP = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}


def test_python_code_in_a_model_folder_is_never_executed(tmp_path: Path, canary: Path) -> None:
    unknown = model_folder(tmp_path / "unknown", auto_map=AUTO_MAP, model_type="of_its_own")
    with_code(unknown, canary)
    with pytest.raises(ConfigError, match=r"model\.policy\.path: .*Python code.*not supported; use a model") as error:
        _ = Policy(path=str(unknown)).config
    assert "\n" not in str(error.value)
    known = model_folder(tmp_path / "known", auto_map=AUTO_MAP)
    with_code(known, canary)
    policy = Policy(path=str(known))
    policy.load()
    assert type(policy.model).__module__.startswith("transformers.")
    assert not canary.exists()


def test_a_tokenizers_code_is_never_executed(tmp_path: Path, canary: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with_code(folder, canary)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.C", "code.C"]}, "tokenizer_class": "OfItsOwn"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        assert Policy(path=str(folder)).encode_prompt("a4")  # with the class for tokenizer.json
    except ConfigError as error:
        assert "not supported" in str(error)  # noqa: PT017 - releases of transformers differ
    assert not canary.exists()


def test_pickled_weights_are_loaded_as_tensors_only(tmp_path: Path, canary: Path) -> None:
    folder = model_folder(tmp_path / "model", "model.safetensors")
    weights = load_file(EMBEDDED / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    policy = Policy(path=str(folder))
    policy.load()
    assert torch.equal(policy.model.state_dict()["model.norm.weight"], weights["model.norm.weight"])
    torch.save({**weights, "more": Evil(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickle that contains more than tensors.*safetensors"):
        Policy(path=str(folder)).load()
    assert not canary.exists()


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no such role') }}"],
    ids=["sandbox escape", "refusal"],
)
def test_a_chat_template_that_fails_or_escapes_is_refused_in_one_line(tmp_path: Path, template: str) -> None:
    folder = model_folder(tmp_path / "model", "chat_template.jinja")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=r"model\.policy\.path: the chat template of"):
        Policy(path=str(folder)).encode_prompt("a4")


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, with credentials in the environment."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOKENS.items():
            patch.setenv(name, value)
        assert cli_exit_code("fit", folder, "--trainer.max_epochs=1") == 0
        assert cli_exit_code("validate", folder, "--ckpt_path=last") == 0
    return folder


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(next(run.rglob("last.ckpt")), weights_only=True)


@pytest.mark.parametrize("name", slow_except(["fit", "predict", "shift"], "fit", "predict"))
def test_pickled_objects_in_a_checkpoint_are_never_executed(
    name: str, run1: Path, tmp_path: Path, canary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({**checkpoint(run1), "callbacks": {"more": Evil(canary)}}, path)
    assert cli_exit_code(name, tmp_path, f"--ckpt_path={path}") == 2
    assert "evil.ckpt holds pickled objects that could run code" in error_line(capfd)
    assert not canary.exists()


def test_a_class_named_by_a_checkpoint_is_never_imported(
    run1: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_method.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Method: ...\n")
    path = tmp_path / "evil.ckpt"
    names = {
        "_class_path": "evil_method.Method",
        "_instantiator": "evil_method.Method",
        "method": {"class_path": "evil_method.Method"},
    }
    torch.save({**checkpoint(run1), "hyper_parameters": names}, path)
    assert cli_exit_code("validate", tmp_path, f"--ckpt_path={path}") == 0
    assert not canary.exists()


# -- data sets, pages and tables -----------------------------------------------------------------------------------


def test_a_data_sets_script_is_never_executed(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    load = datasets.load_dataset
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    monkeypatch.setattr("rlrt_lightning.runtime.hub.check_reachable", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **settings: load(str(tmp_path / "evil"), **settings))
    with pytest.raises(ConfigError, match="nor a dataset that can be loaded"):
        DatasetTask(train="owner/evil").problems("train")
    with pytest.raises(ConfigError, match="holds no"):
        DatasetTask(train=str(tmp_path / "evil")).problems("train")
    assert not canary.exists()


def test_markup_in_completions_is_escaped() -> None:
    text = "<script>alert(1)</script>` | ![x](http://h)"
    rollout = Scored(text, text, text, 1.0, [Token(text, 1.0, -1.0, -2.0, 1.0, 1.0)])
    page = html_page(Picture(text, text, text, text, [rollout]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 10
    row = markdown(["prompt"], [[text]]).splitlines()[2]
    assert row.startswith("| `<script>")
    assert row.count("`") == row.count("|") == 2, "one cell, all of it code"


# -- credentials ---------------------------------------------------------------------------------------------------


def test_credentials_in_the_environment_are_not_written_to_files(run1: Path) -> None:
    files = [path for path in run1.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in TOKENS.values()), path


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.logger=WandbLogger", "--trainer.logger.api_key=canary"],
        ["--model.policy.chat_kwargs={hf_token: canary}"],
        ["--data.engine=VllmServerEngine", "--data.engine.urls=[http://me:canary@10.0.0.1:8000]"],
        ["--ckpt_path=https://canary@host/last.ckpt"],
        ["--data.engine=VllmServerEngine", "--data.engine.urls={a: http://me:canary@h}"],
        ["--model.policy.chat_kwargs={hf_token: canary}", "--print_config"],
    ],
)
def test_credentials_in_settings_are_refused_and_not_printed(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--trainer.default_root_dir={tmp_path}", *flags]) == 2
    out = capfd.readouterr()
    assert "canary" not in out.out + out.err
    assert "error: " in out.err
    assert not list(tmp_path.rglob("config.yaml"))


def test_only_credentials_are_refused_and_masked() -> None:
    refuse_credentials({"max_new_tokens": "30", "api_key": None, "token": True, "text": "me@host, see http://host/@x"})
    for settings in ({"loggers": [{"init_args": {"api_token": "x"}}]}, {"a": ["b", "http://me@host"]}):
        with pytest.raises(ConfigError, match="environment"):
            refuse_credentials(settings)
    assert masked("no http://me:pw@host:1/a@b") == "no http://***@host:1/a@b"


# -- servers -------------------------------------------------------------------------------------------------------


def test_serving_on_another_host_warns_and_flags_cannot_set_the_host(caplog: pytest.LogCaptureFixture) -> None:
    engine = VllmServerEngine(["http://127.0.0.1:8000"])
    for host in ("127.0.0.1", "localhost", "::1"):
        server_command(Policy(), engine, host, 8000, [])
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        server_command(Policy(), engine, "0.0.0.0", 8000, [])
    assert "trusted network" in caplog.text
    with pytest.raises(ConfigError, match=r"serve\.flags sets --host"):
        server_command(Policy(), engine, "127.0.0.1", 8000, ["--host=0.0.0.0"])
    with pytest.raises(ConfigError, match=r"serve\.flags sets --hf-overrides.*model\.policy\.head_dtype=null"):
        server_command(Policy(), engine, "127.0.0.1", 8000, ["--hf_overrides", "{}"])
    assert "--trust-remote-code" not in server_command(Policy(), engine, "127.0.0.1", 8000, [])


def test_the_servers_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert "authorization" not in Server("http://127.0.0.1", 1, 1, 1).client.headers
    monkeypatch.setenv("VLLM_API_KEY", "canary")
    assert Server("http://127.0.0.1", 1, 1, 1).client.headers["authorization"] == "Bearer canary"

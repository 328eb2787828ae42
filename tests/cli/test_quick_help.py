"""The text of --help is cached, and built again when anything that it depends on changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlrt_lightning.__main__ import main
from rlrt_lightning.cli import quick_help


def test_help_is_built_once_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["fit", "--help"]) == 0
    made = capsys.readouterr().out
    assert "--model.method" in made
    monkeypatch.setattr("rlrt_lightning.cli.commands.RLRTCli", None)  # building the help again would fail
    assert main(["fit", "--help"]) == 0
    assert capsys.readouterr().out == made
    monkeypatch.setattr(quick_help, "version", lambda name: "another")
    with pytest.raises(TypeError):
        main(["fit", "--help"])


def test_help_says_what_the_commands_do_without_a_writable_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in ("fit Trains the policy.", "validate Evaluates a checkpoint,", "reflection Reflection injection"):
        assert line in text


@pytest.mark.parametrize("args", [["fit"], ["fit", "--model.method.help", "RLRT"], ["fit", "--config=x", "--help"], []])
def test_only_plain_help_requests_are_cached(args: list[str]) -> None:
    assert not quick_help.asks_for_help(args)

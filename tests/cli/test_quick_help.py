"""The text of --help is kept, and made anew when something that makes it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlrt_lightning.__main__ import main
from rlrt_lightning.cli import quick_help


def test_help_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["fit", "--help"]) == 0
    made = capsys.readouterr().out
    assert "--model.method" in made
    monkeypatch.setattr("rlrt_lightning.cli.commands.RLRTCli", None)  # whoever needs it now fails
    assert main(["fit", "--help"]) == 0
    assert capsys.readouterr().out == made
    monkeypatch.setattr(quick_help, "version", lambda name: "another")
    with pytest.raises(TypeError):
        main(["fit", "--help"])


def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["--help"]) == 0
    assert "reflection" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["fit"], ["fit", "--model.method.help", "RLRT"], ["fit", "--config=x", "--help"], []]
)
def test_what_depends_on_more_is_not_kept(words: list[str]) -> None:
    assert not quick_help.asks_for_help(words)

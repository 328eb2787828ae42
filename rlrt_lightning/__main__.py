"""`python -m rlrt_lightning {fit,validate,test,predict,reflection,shift,curves,pass_at_k}`."""

from __future__ import annotations

import os
import sys
import warnings

from rlrt_lightning import __version__
from rlrt_lightning.runtime.errors import ConfigError

EXPECTED_WARNINGS = (
    # From Lightning's use of torch and jsonargparse, and peft's use of transformers.
    r".*isinstance\(treespec, LeafSpec\)",
    r".*`is_gradient_checkpointing` is deprecated",
    r"\s*(By default only one JsonargparseDeprecationWarning|[\s\S]* was deprecated in v4\.)",
    # Intended: a resumed run continues in its folder, or from another run's checkpoint in a folder of its own, a
    # teacher's copy is in eval mode, and an epoch in which all advantages are 0 has nothing to train on.
    r"Checkpoint directory .* exists and is not empty",
    r"Experiment logs directory .* exists and is not empty",
    r"The dirpath has changed from",
    r"Found \d+ module\(s\) in eval mode",
    r"Total length of .* across ranks is zero",
    r"MLFlow only allows .* Replacing",
)
"""Warnings to suppress because users cannot act on them: regular expressions that match their beginning."""


def main(args: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Command-line arguments; None for `sys.argv[1:]`.

    Returns:
        Exit code: 0, or 2 if a setting or an input is wrong.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn about the verifier's processes
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for each table, between our lines
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["--version"]:
        print(f"rlrt_lightning {__version__}")
        return 0
    # Imported here, because the verifier's worker processes import this module.
    from rlrt_lightning.analysis import runs
    from rlrt_lightning.cli import quick_help

    if words and words[0] in runs.COMMANDS:  # commands on files, without the imports below
        try:
            runs.main(words)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    def command_line() -> int:
        try:
            from rlrt_lightning.cli.commands import RLRTCli
            from rlrt_lightning.cli.refusals import run
            from rlrt_lightning.runtime import terminal
        except KeyboardInterrupt:  # the imports take seconds
            return 130
        terminal.set_up()
        return run(lambda: RLRTCli(words))

    if quick_help.asks_for_help(words):
        quick_help.show(words, command_line)
        return 0
    return command_line()


def console() -> int:
    """The command `rlrt_lightning`. Like `python -m`, it imports rewards and methods from the current folder.

    Returns:
        The exit code of `main`.
    """
    sys.path.insert(0, os.getcwd())
    return main()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m rlrt_lightning {fit,validate,test,predict,reflection,shift,curves,pass_at_k}`."""

from __future__ import annotations

import os
import sys
import warnings

from rlrt_lightning.runtime.errors import ConfigError

EXPECTED_WARNINGS = (
    # Lightning's own use of torch and of jsonargparse, and peft's of transformers, which the user can do nothing about.
    r".*isinstance\(treespec, LeafSpec\)",
    r".*`is_gradient_checkpointing` is deprecated",
    r"\s*(By default only one JsonargparseDeprecationWarning|[\s\S]* was deprecated in v4\.)",
    # What we mean to do: a resumed run has a folder of its own, a teacher's copy is never trained, and in an epoch in
    # which no rollout is better than its siblings there is nothing to train on.
    r"The dirpath has changed from",
    r"Found \d+ module\(s\) in eval mode",
    r"Total length of .* across ranks is zero",
)
"""Warnings that say nothing to the user, as regular expressions of how they begin."""


def main(args: list[str] | None = None) -> int:
    """The command line.

    Args:
        args: Words of the command; those of the process where None.

    Returns:
        Exit code: 0, or 2 where a setting or an input is wrong.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the verifier's processes would make it warn
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    words = sys.argv[1:] if args is None else args
    # Imported here, since the verifier's worker processes import this module again.
    from rlrt_lightning.analysis import runs
    from rlrt_lightning.cli import quick_help

    if words and words[0] in runs.COMMANDS:  # files only: nothing heavy is needed
        try:
            runs.main(words)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    def command_line() -> int:
        from rlrt_lightning.cli.commands import RLRTCli
        from rlrt_lightning.cli.refusals import run

        return run(lambda: RLRTCli(words))

    if quick_help.asks_for_help(words):
        quick_help.show(words, command_line)
        return 0
    return command_line()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m rlrt_lightning {fit,validate,test,predict,reflection,shift,curves,pass_at_k}`."""

from __future__ import annotations

import os
import sys
import warnings

from rlrt_lightning.errors import ConfigError


def main(args: list[str] | None = None) -> int:
    """The command line.

    Args:
        args: Words of the command; those of the process where None.

    Returns:
        Exit code: 0, or 2 where a setting or an input is wrong.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the verifier's processes would make it warn
    # Lightning's own use of torch, which the user can do nothing about.
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    words = sys.argv[1:] if args is None else args
    # Imported here, since the verifier's worker processes import this module again.
    from rlrt_lightning import quick_help
    from rlrt_lightning.analysis import runs

    if words and words[0] in runs.COMMANDS:  # files only: nothing heavy is needed
        try:
            runs.main(words)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    def command_line() -> int:
        from rlrt_lightning.cli import RLRTCli, run

        return run(lambda: RLRTCli(words))

    if quick_help.asks_for_help(words):
        quick_help.show(words, command_line)
        return 0
    return command_line()


if __name__ == "__main__":
    sys.exit(main())

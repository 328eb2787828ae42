"""What every part stands on: errors, random streams, ranks, checkpoints, how a run ends."""

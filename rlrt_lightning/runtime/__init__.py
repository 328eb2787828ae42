"""Shared foundations: errors, random streams, ranks, checkpoints, run files and stopping."""

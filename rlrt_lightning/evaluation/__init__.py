"""Evaluations: metrics with their intervals, and the files of their results."""

"""Evaluation: metrics with confidence intervals, evaluation sets, and result files."""

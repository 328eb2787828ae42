"""RLRT."""

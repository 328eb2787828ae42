"""The command line. This package imports nothing, so `--help` and worker processes start quickly."""

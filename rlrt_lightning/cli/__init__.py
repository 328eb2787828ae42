"""The command line. Nothing is imported here, so that `--help` and worker processes start quickly."""

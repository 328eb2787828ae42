"""Private names of other libraries that have no public equivalent, one module per library.

`tests/runtime/test_private_names.py` fails by name if a release changes one of them.
"""

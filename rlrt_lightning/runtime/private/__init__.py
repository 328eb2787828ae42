"""Private names of other libraries for which there is no public one, one module a library.

`tests/runtime/test_private_names.py` fails by name where a release changes one of them.
"""

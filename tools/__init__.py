"""Tools of development, run from the root of a checkout: ``python -m tools.<name>``."""

"""Predictions of GPUs that are not there: see README.md."""

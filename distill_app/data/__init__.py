"""Readers of the two sources, selection of records, and the held-out split."""

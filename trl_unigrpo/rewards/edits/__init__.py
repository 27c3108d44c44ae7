"""Rewards of edits: whether the instruction was followed, and what should stay stayed."""

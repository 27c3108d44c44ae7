"""Rewards of the CLIP family."""

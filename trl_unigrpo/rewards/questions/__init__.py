"""Rewards made of yes-no questions about an image."""

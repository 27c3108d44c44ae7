"""Rewards that are computed by a server."""

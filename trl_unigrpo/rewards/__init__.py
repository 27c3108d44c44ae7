"""Rewards: plain TRL reward functions on images, usable without a trainer."""

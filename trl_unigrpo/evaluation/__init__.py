"""Sampling from a trained model, scores and statistics."""

from .generate import Sample, generate


__all__ = ["Sample", "generate"]

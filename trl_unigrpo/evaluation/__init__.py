"""Sampling from a trained model, scores and statistics."""

from ..guidance import Guidance
from .generate import Sample, generate


__all__ = ["Guidance", "Sample", "generate"]

"""Unified models, and the contract that makes one."""

from .registry import load_unified_model, unified_model


__all__ = ["load_unified_model", "unified_model"]

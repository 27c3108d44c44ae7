"""Checks, galleries and alarms around a run."""

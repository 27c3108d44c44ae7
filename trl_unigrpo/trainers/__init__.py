"""Trainers and their configurations: UniGRPO, supervised fine-tuning, ReFL."""

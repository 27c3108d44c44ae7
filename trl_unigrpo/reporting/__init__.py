"""What shows a run: galleries, pages, run files, trackers, the model card."""

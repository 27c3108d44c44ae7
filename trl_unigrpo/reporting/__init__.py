"""Parts that show a run: gallery, pages, run files, trackers, the model card."""

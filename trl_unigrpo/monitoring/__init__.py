"""Parts that watch a run: its events, start-up checks, alarms, statistics of images, progress."""

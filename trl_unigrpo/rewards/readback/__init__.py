"""A reward without a judge: how well a model reads the prompt back from the image."""

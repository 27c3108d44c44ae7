"""GenEval's detector and rules as a reward."""

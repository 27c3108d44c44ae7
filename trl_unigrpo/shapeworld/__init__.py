"""ShapeWorld: a built-in world of coloured shapes, with prompts, a renderer, and a rule that scores pictures."""

"""The paper's tables and figures, measured on ShapeWorld."""

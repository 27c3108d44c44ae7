"""`trl-unigrpo paper`: the tables and figures of UniGRPO's paper, measured on ShapeWorld."""

"""The making of the tiny model that training starts from."""

"""How the tiny model that training starts from was made."""

"""The campaign on a card: one command measures what this pack does there; see `__main__`."""

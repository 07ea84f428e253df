"""Model cards: what a checkpoint is made from, how it scored, and what may be done with it."""

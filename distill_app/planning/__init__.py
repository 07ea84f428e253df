"""What a run will take, reckoned from the params before anything runs."""

"""The verdict: scores on held-out data, and what a person sees of them."""

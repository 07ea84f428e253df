"""The teacher's labels: the store of answers, what is asked of it, and how likely it finds its answers."""

"""What the five models answer to held-out prompts, and what their answers cost."""

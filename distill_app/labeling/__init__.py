"""Asking models: the engine that generates, the teacher's labels, a student's replies."""

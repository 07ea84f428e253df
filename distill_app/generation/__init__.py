"""Prompts in, answers out: the engines that generate. They know no store and no labels."""

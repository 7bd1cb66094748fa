"""The independent truth: the reference recipes as plain loops. Imports nothing of the package."""

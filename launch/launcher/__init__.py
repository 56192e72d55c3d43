"""Recipes to command lines, and the process that runs them."""

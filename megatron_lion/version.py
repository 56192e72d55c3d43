"""The one place of this package's version; setup.py reads it as text."""

__version__ = "0.1.0"

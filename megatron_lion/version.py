"""The one place of this package's version; pyproject.toml names it."""

__version__ = "0.1.0"

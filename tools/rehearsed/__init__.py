"""Parts of ``tools/rehearse_layouts.py``."""

"""Reproduction of the paper: theory, studies, figures and the report."""

"""The report: what the paper shows, what the runs left of it, and the page that holds both."""

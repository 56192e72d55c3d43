"""Stand-ins for packages that need a GPU. ``apex`` and ``amp_C`` are found with this folder on the path."""

"""In the place of NVIDIA's Apex: the names that Megatron looks for. Not the package "apex" of PyPI."""

"""The check of one GPU machine that tools/gpu_check.sh starts: parts with time limits, one summary."""

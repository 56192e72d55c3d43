"""What tools/benchmark/step.py is made of: shapes, what each step reads and writes, peers, and the tables."""

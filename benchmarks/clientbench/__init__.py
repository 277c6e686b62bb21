"""The parts of benchmarks/storm.py: callers in processes of their own, what became of their calls, the plot."""

"""The parts of benchmarks/redis.py: a server, what is measured, and the processes that call it."""

"""What Seawall costs, measured beside what its peers cost. Run `python benchmarks/overhead.py --help`."""

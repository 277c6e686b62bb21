"""Access logs, replayed through a policy: who would have been refused, by which limit, and when.

`logs` turns lines into requests, `engine` decides on them with the objects that serve, `tally` counts, `plot` draws.
"""

"""The life of the processes: start, readiness, drain."""

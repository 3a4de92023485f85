"""Sockets and tasks, on trio. Each module owns one kind of socket or task."""

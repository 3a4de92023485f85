"""The rules of RFC 9110 and 9112 for an intermediary, row by row, against the relay as its peers see it."""

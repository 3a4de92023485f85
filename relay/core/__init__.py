"""Pure protocol code: bytes and times come in as arguments; nothing here awaits, logs or reads a clock."""

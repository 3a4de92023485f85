"""A streaming relay between OpenAI-compatible clients and LLM inference engines."""

__version__ = "0.1.0"

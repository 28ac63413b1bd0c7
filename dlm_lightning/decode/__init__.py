"""Decoding: from a prompt and masked tokens to text."""

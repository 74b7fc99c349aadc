"""What a terminal is, without one: keys, typing, prompts, colours. Pure: bytes and text in, bytes and text out."""

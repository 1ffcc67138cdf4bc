"""Floor 8: the OpenAI-compatible HTTP server. ``create_app`` makes the ASGI app, ``launch.run`` serves it."""

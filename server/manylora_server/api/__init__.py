"""The HTTP layer: OpenAI's shapes over the engine. ``app.create_app`` puts it together."""

"""Fingerpost's serving path: answer a prompt from the cache, or send it to the model that is just good enough."""

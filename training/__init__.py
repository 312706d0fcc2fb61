"""From labelled prompts to what Triton serves: rows, base, model, train, export. Offline; the gateway never imports it."""

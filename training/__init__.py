"""From labelled prompts to what Triton serves: rows, base, model, train, export. The gateway never imports it."""

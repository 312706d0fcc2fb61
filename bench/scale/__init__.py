"""How the semantic cache bears a thousand entries, a hundred thousand and a million: docs/scale.md."""

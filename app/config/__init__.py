"""Configuration: precedence, validation, allowed imports, messages of the parser, schema."""

"""The verbs of the `glassine` command. Heavy imports stay inside them, so that help answers at once."""

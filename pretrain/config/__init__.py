"""The tree of settings, how it is read from YAML and the command line, and the rules it keeps. No torch."""

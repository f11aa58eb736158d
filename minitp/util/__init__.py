"""Small helpers: the machine and the launcher (environment), stdout, text (format), suggestions (suggest)."""

"""Let people say which of two answers is better: pairs, a page at a site's own machine, and TRL's preference form."""

"""Messages, engines and sites: what crosses the border, how, and what answers."""

"""Questions about images, preferences between answers, and which site holds which of them."""

"""Federated vision-language alignment through preferences: no image, annotation or weight leaves a site."""

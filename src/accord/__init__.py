"""Federated vision-language alignment through preferences: no image, annotation or reward model leaves a site."""

"""Routers: what maps an image's evidence to a route. One interface for gates and cascades (`base`), and the kinds by name (`kinds`)."""

"""Routers map an image's evidence to a route.

`base` defines the common interface of gates and cascades (docs/definitions.md, Router); `kinds` is
the registry of the kinds of router.
"""

"""Routers map an image's evidence to a route.

`base` is the one interface of gates and cascades (docs/definitions.md, Router); `kinds` knows them
by name.
"""

"""`dsnet-orch serve`: a bundle behind HTTP, on Ray Serve."""

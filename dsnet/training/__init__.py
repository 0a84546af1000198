"""Stage I: training of supernets."""

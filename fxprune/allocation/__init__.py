"""How much to take from which group, read off error tables rather than searched for."""
